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

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.kernels import gather_tokens as _gather  # noqa: F401  (registers the operators)
from zipvl_compile.passes.graph.graph import args_of, calls, example, insert_call, is_call

ops = torch.ops.zipvl


def find(graph: Graph) -> list[Node]:
    """Return the gathers that take every token."""
    return [gather for gather in calls(graph, ops.gather_tokens) if _takes_all(gather)]


def _takes_all(gather: Node) -> bool:
    x, positions = args_of(gather)[:2]
    return is_call(positions, ops.token_positions) and statically_known_true(
        example(x).shape[2] == example(args_of(positions)[0]).shape[2]
    )


def apply(graph: Graph) -> None:
    """Replace every gather of all tokens."""
    for gather in find(graph):
        x, _, spare = args_of(gather)
        gather.replace_all_uses_with(insert_call(gather, ops.with_room.default, (x, spare)))
        graph.erase_node(gather)
