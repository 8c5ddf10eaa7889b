"""Write the user's choice of kernels into every operator of this package that has one.

    sparse_attention(q, k, v, ...)      becomes      sparse_attention(q, k, v, ..., kernel_="torch")

The choice is part of the graph, so that compiled graphs that are cached on disk cannot be mixed up.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node


def has_choice(node: Node) -> bool:
    """Return whether the node calls an operator of this package that has several implementations."""
    target = node.target  # Dynamo records the packet of overloads, the passes insert the overload
    overload = target.default if node.op == "call_function" and hasattr(target, "default") else target
    if not isinstance(overload, torch._ops.OpOverload) or overload.namespace != "zipvl":
        return False
    return any(argument.name == "kernel_" for argument in overload._schema.arguments)


def apply(graph: Graph, kernel: str) -> None:
    """Set `kernel`, "auto", "triton" or "torch", on every operator of `graph` that has it."""
    for node in graph.nodes:
        if has_choice(node):
            node.update_kwarg("kernel_", kernel)
