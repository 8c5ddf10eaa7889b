"""A layer that keeps every token has the cache that it would have without zipvl, or a copy with room for decoding.

Before:

    positions = token_positions(k)                                  graph output: the layer's positions
    keys      = gather_tokens(k, positions, spare)                  graph output: the layer's cache

After, where copying the cache in every decode step costs less than our operators do (fewer than `LEAST` tokens):

    keys      = with_room(k, 0)                                     no positions: a plain cache, which grows by `cat`

and otherwise:

    positions = token_positions(k)
    keys      = with_room(k, spare)                                 decoding appends in place

A copy is a fused part of what computes k; a gather looks up where every token stands. Runs after the passes that put
selections in the place of `token_positions`.
"""

from __future__ import annotations

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from zipvl_compile.passes.graph.graph import replace
from zipvl_compile.passes.graph.op_calls import GatherTokensCall, TokenPositionsCall, WithRoomCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.match import cache_layers
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings

LEAST = 2048  # tokens; `benchmarks/test_left_dense.py` compares both


def find(graph: Graph) -> list[GatherTokensCall]:
    """Return the gathers that take every token."""
    return [gather for gather in GatherTokensCall.all(graph) if _takes_all(gather)]


def _takes_all(gather: GatherTokensCall) -> bool:
    if not TokenPositionsCall.matches(gather.positions):
        return False
    k = TokenPositionsCall.read(gather.positions).k
    return statically_known_true(example(gather.x).shape[2] == example(k).shape[2])


def plain_layers(graph: Graph, gathers: list[GatherTokensCall]) -> set[Node]:
    """Return the positions of cache layers of which nothing but the graph's outputs reads a part, and all is kept.

    Whether they hold fewer than `LEAST` tokens becomes a guard of the compiled graph.
    """
    taken = {gather.node for gather in gathers}
    return {
        call.node
        for call in TokenPositionsCall.all(graph)
        if call.node is not None
        and cache_layers.only_cached(call.node)
        and not cache_layers.is_static(call.node)
        and (stored := cache_layers.gathers(call.node))
        and all(gather.node in taken for gather in stored)
        and example(call.k).shape[2] < LEAST
    }


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Replace every gather of all tokens, and the positions of the layers that need none."""
    gathers = find(graph)
    # Where the prompt was sparse (evict="keep"), decoding reads the full cache with our operators.
    plain = plain_layers(graph, gathers) - {site.layer for site in sites.prefill if site.rewritten}  # type: ignore[misc]
    if settings.reselect_every:  # what is generated may be selected from
        plain = set()
    others = {node for positions in plain for node in cache_layers.followers(positions)}  # where all are kept: empty
    for gather in gathers:
        assert gather.node is not None
        spare = 0 if gather.positions in plain else gather.spare
        replace(gather.node, WithRoomCall(x=gather.x, spare=spare).insert(gather.node))
        graph.erase_node(gather.node)
    output = graph.output_node()
    output.args = map_arg(output.args, lambda node: None if node in plain | others else node)
    for node in sorted(plain | others, reverse=True):
        graph.erase_node(node)
