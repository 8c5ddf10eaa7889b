"""Compact keys and values in one launch.

Before:

    keys   = gather_tokens(k, positions, spare)
    values = gather_tokens(v, positions, spare)

After:

    both   = gather_kv(k, v, positions, spare)
    keys   = both[0];   values = both[1]

Only for gathers that follow each other, as `sparsify_prefill` leaves them: then nothing between them can depend on the
first. Runs last, since other passes look for single gathers.
"""

from __future__ import annotations

from torch.fx import Graph

from zipvl_compile.passes.graph.graph import replace
from zipvl_compile.passes.graph.op_calls import GatherKVCall, GatherTokensCall, outputs
from zipvl_compile.passes.graph.reading import example, same_shape
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings

Pair = tuple[GatherTokensCall, GatherTokensCall]


def find(graph: Graph) -> list[Pair]:
    """Return the pairs of neighbouring gathers that take the same positions of equally many heads and tokens."""
    pairs: list[Pair] = []
    taken = set()
    for first in GatherTokensCall.all(graph):
        assert first.node is not None
        if first.node in taken or not GatherTokensCall.matches(first.node.next):
            continue
        second = GatherTokensCall.read(first.node.next)
        if _fit(first, second):
            pairs.append((first, second))
            taken.add(second.node)
    return pairs


def _fit(first: GatherTokensCall, second: GatherTokensCall) -> bool:
    where = (first.positions, first.spare) == (second.positions, second.spare)
    return where and first.x is not second.x and same_shape(example(first.x).shape[:3], example(second.x).shape[:3])


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Fuse every pair of gathers of `graph`."""
    for first, second in find(graph):
        assert first.node is not None and second.node is not None
        both = GatherKVCall(k=first.x, v=second.x, positions=first.positions, spare=first.spare).insert(second.node)
        for node, output in zip((first.node, second.node), outputs(both, second.node), strict=True):
            replace(node, output)
            graph.erase_node(node)
