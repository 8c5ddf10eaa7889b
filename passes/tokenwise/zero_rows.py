"""Whether what is computed below an attention may be given rows of zeros.

Attention gives zero to a token that was not selected, and a model never does: nothing says what a layer makes of a row
of zeros. `refusal` follows the rows to where each meets a row of its own again, as in the residual connection, with
what is known of their values (`row_values.py`):

    x + linear(a, w)                              zeros stay zeros
    x + rms_norm(linear(a, w), eps=1e-6)          finite
    x + linear(round(a / amax|a|) * amax|a|, w)   0 / 0: refused
    x + custom_op(a)                              refused: nobody knows
"""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.reading import (
    example,
    holds_tensors,
    is_op,
    read_by_value,
    same_shape,
    spelled,
    written,
)
from zipvl_compile.passes.tokenwise import row_values
from zipvl_compile.passes.tokenwise.axis_rules import Mixes, rank
from zipvl_compile.passes.tokenwise.backward_slice import reads_size
from zipvl_compile.passes.tokenwise.row_values import ZERO, Interval
from zipvl_compile.passes.tokenwise.token_axis import axis_below

Known = dict[Node, tuple[int, Interval]]
LEAVES_THE_GRAPH = "a graph break lies below the attention: what reads its rows is not known"


def refusal(start: Node, axis: int) -> str:
    """Return why rows of zeros of `start`, along its `axis`, may not be read, or an empty string."""
    known: Known = {start: (axis, ZERO)}
    node = start.next
    while node.op != "output":
        given = {x: known[x] for x in read_by_value(node) if x in known}
        if given and not reads_size(node) and not _meets_rows(node, known):
            try:
                known[node] = _follow(node, given)
            except Mixes as reason:
                return str(reason)
        node = node.next
    return "" if known.keys().isdisjoint(node.all_input_nodes) else LEAVES_THE_GRAPH


def _meets_rows(node: Node, known: Known) -> bool:
    """Return whether a node adds a tensor with rows of its own: what comes of it is as in any other layer."""
    if not is_op(node, "add", "sub", "add_", "sub_"):
        return False
    tensors = [x for x in node.all_input_nodes if holds_tensors(x)]
    return any(x not in known and same_shape(example(x).shape, example(node).shape) for x in tensors)


def _follow(node: Node, given: Known) -> tuple[int, Interval]:
    if written(node):
        raise Mixes(f"{spelled(node)!r} changes a tensor in place")
    axis = _axis(node, {x: axis for x, (axis, _) in given.items()})
    return axis, row_values.below(node, {x: interval for x, (_, interval) in given.items()})


def _axis(node: Node, given: dict[Node, int]) -> int:
    try:
        return axis_below(node, given)
    except Mixes:
        if not is_op(node, "view", "reshape", "flatten"):
            raise
        ((source, axis),) = given.items()
        found = _joined(source, axis, node)
        if found is None:
            raise
        return found


def _joined(source: Node, axis: int, node: Node) -> int | None:
    """Return the axis of a reshaped tensor that counts the tokens of all samples, or does no more, or None."""
    features = _size(example(source).shape[axis + 1 :])
    shape = example(node).shape
    same = [at for at in range(rank(node)) if statically_known_true(_size(shape[at + 1 :]) == features)]
    return same[0] if same else None


def _size(shape: torch.Size) -> int:
    total = 1
    for size in shape:
        total = total * size
    return total
