"""Every query attends in a layer that cannot take rows of zeros.

The paper gives zero to a token that was not selected, and the layer's projection then reads a row of zeros. Linear maps
and norms with an epsilon take it; a projection that scales each token, as dynamic int8 does, may divide zero by zero,
and of an operation that nobody knows nothing can be said. There

    out = sparse_attention(q, keys, values, positions, ..., queries="selected")

becomes

    out = sparse_attention(q, keys, values, positions, ..., queries="all")

so that every row that the layer reads is a true one: what its query sees of the kept tokens. That is sound for any
function, row by row or not. Computing the kept rows only and giving zero to the others after the projection would need
a proof that the projection treats each token by itself, and a guess where it ends; the value of an unselected token
would be one that no model computes.

Which operations may see zeros is decided by `tokenwise/zero_rows.py`. Rows that leave the graph, as at a graph break
between an attention and its projection, count as read by something unknown.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.op_calls import SparseAttentionCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.match import reasons
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise import zero_rows


def refusal(site: Site) -> str:
    """Return why rows of the attention may not be zero, or an empty string."""
    if not SparseAttentionCall.matches(site.node):
        return ""
    call = SparseAttentionCall.read(site.node)
    kept, n = example(call.positions).shape[2], example(call.q).shape[2]
    if call.queries == "all" or statically_known_true(kept == n):
        return ""
    try:
        return zero_rows.refusal(site.node, 2)
    except Exception as error:  # a fault of ours must not break the user's compile
        return str(reasons.fault(error))


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Let every query attend where rows of zeros may not be read; note the reason."""
    for site in sites.prefill:
        if why := refusal(site):
            replace(SparseAttentionCall.read(site.node), queries="all").write()
            site.every_query = why
            if site.shape is not None:
                site.shape = replace(site.shape, every_query=True)
