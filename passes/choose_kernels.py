"""Write the user's choice of kernels into every operator of this package that has one.

    sparse_attention(q, k, v, ...)      becomes      sparse_attention(q, k, v, ..., kernel_="torch")

The choice is part of the graph, so that compiled graphs that are cached on disk cannot be mixed up.
"""

from __future__ import annotations

from torch.fx import Graph

from zipvl_compile.passes.graph.op_calls import has_kernels
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Set `kernel`, "auto", "triton" or "torch", on every operator of `graph` that has it."""
    for node in graph.nodes:
        if has_kernels(node):
            node.update_kwarg("kernel_", settings.kernel)
