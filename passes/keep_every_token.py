"""A layer that stays dense keeps every token: its cache is a copy with room, not a gather.

Before:

    positions = token_positions(k)
    keys = gather_tokens(k, positions, spare)

After:

    positions = token_positions(k)
    keys = with_room(k, spare)

The copy is a fused part of what computes k; a gather looks up where every token stands. Runs after the passes that put
selections in the place of `token_positions`.
"""

from __future__ import annotations

from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import replace
from zipvl_compile.passes.graph.op_calls import GatherTokensCall, TokenPositionsCall, WithRoomCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings


def find(graph: Graph) -> list[GatherTokensCall]:
    """Return the gathers that take every token."""
    return [gather for gather in GatherTokensCall.all(graph) if _takes_all(gather)]


def _takes_all(gather: GatherTokensCall) -> bool:
    if not TokenPositionsCall.matches(gather.positions):
        return False
    k = TokenPositionsCall.read(gather.positions).k
    return statically_known_true(example(gather.x).shape[2] == example(k).shape[2])


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Replace every gather of all tokens."""
    for gather in find(graph):
        assert gather.node is not None
        replace(gather.node, WithRoomCall(x=gather.x, spare=gather.spare).insert(gather.node))
        graph.erase_node(gather.node)
