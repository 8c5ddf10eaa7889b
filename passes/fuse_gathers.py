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

import operator

import torch
from torch.fx import Graph, Node

from zipvl_compile.passes.graph.graph import calls, example, insert_call, is_call
from zipvl_compile.passes.match.attention_site import same_shape

ops = torch.ops.zipvl


def find(graph: Graph) -> list[tuple[Node, Node]]:
    """Return the pairs of neighbouring gathers that take the same positions of equally many heads and tokens."""
    pairs: list[tuple[Node, Node]] = []
    for first in calls(graph, ops.gather_tokens):
        second = first.next
        taken = {node for pair in pairs for node in pair}
        if first not in taken and is_call(second, ops.gather_tokens) and _fit(first, second):
            pairs.append((first, second))
    return pairs


def _fit(first: Node, second: Node) -> bool:
    (k, *where), (v, *same) = first.args, second.args
    return where == same and k is not v and same_shape(example(k).shape[:3], example(v).shape[:3])


def apply(graph: Graph) -> None:
    """Fuse every pair of gathers of `graph`."""
    for first, second in find(graph):
        both = insert_call(second, ops.gather_kv.default, (first.args[0], second.args[0], *first.args[1:]))
        for i, node in enumerate((first, second)):
            node.replace_all_uses_with(insert_call(second, operator.getitem, (both, i)))
        graph.erase_node(first)
        graph.erase_node(second)
