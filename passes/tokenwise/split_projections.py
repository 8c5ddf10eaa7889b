"""One projection that gives several tensors, split into one for each, so that they can be pruned apart.

Before:                                             After:

    q, k, v = linear(h, w, b).split(sizes, -1)          q = linear(h, w[:a], b[:a])
                                                        k = linear(h, w[a:c], b[a:c])
                                                        v = linear(h, w[c:], b[c:])

The slices are views of the weight. Only pieces along the features, whole and in order, are told apart; a projection
that interleaves the heads of q, k and v stays one.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.graph import erase_unread, insert_call, replace
from zipvl_compile.passes.graph.reading import arguments, changed_in_place, example, holds_subclass, is_op
from zipvl_compile.passes.tokenwise.axis_rules import every_axis
from zipvl_compile.passes.tokenwise.backward_slice import Cone

Piece = tuple[Node, int, int]


def split_above(cone: Cone) -> bool:
    """Split the projections that end a cone because other tensors come from them, too; return whether any was."""
    found = {_projection(source) for source in cone.sources} - {None}
    done = [split(projection) for projection in sorted(found)]  # type: ignore[type-var, arg-type]
    return any(done)


def _projection(node: Node) -> Node | None:
    """Return the linear map that `node` is, or is cut from."""
    while is_op(node, "split", "chunk", "getitem"):
        node = arguments(node)["input"]
    return node if is_op(node, "linear") else None


def split(projection: Node) -> bool:
    """Put a projection for each piece in the place of one that is read in pieces only."""
    found = pieces(projection)
    written = changed_in_place(projection) or any(changed_in_place(piece) for piece, _, _ in found)
    if len(found) < 2 or holds_subclass(projection) or written:  # of a quantised weight no parts are taken
        return False
    given = arguments(projection)
    readers = list(projection.users)
    for piece, start, stop in found:
        rows = (slice(start, stop),)
        weight = insert_call(projection, operator.getitem, (given["weight"], rows))
        bias = given.get("bias")
        bias = None if bias is None else insert_call(projection, operator.getitem, (bias, rows))
        new = insert_call(projection, torch.nn.functional.linear, (given["input"], weight, bias))
        replace(piece, new)
    erase_unread([*(piece for piece, _, _ in found), *readers, projection])
    return True


def pieces(projection: Node) -> list[Piece]:
    """Return what reads a projection, as slices of its features; nothing if anything reads it otherwise."""
    width, found = example(projection).shape[-1], []
    for user in projection.users:
        cut = _cut(user) if is_op(user, "split", "chunk") else _slice(user, width)
        if cut is None:
            return []
        found += cut
    return found


def _cut(user: Node) -> list[Piece] | None:
    given, parts = arguments(user), example(user)
    if given.get("dim", 0) % parts[0].dim() != parts[0].dim() - 1:
        return None
    stops = [sum(part.shape[-1] for part in parts[: i + 1]) for i in range(len(parts))]
    if not all(is_op(piece, "getitem") and isinstance(arguments(piece)["index"], int) for piece in user.users):
        return None
    numbers = [(piece, arguments(piece)["index"] % len(parts)) for piece in user.users]
    return [(piece, stops[i] - parts[i].shape[-1], stops[i]) for piece, i in numbers]


def _slice(user: Node, width: int) -> list[Piece] | None:
    index = arguments(user)["index"] if is_op(user, "getitem") else None
    if not isinstance(index, tuple) or not all(i is Ellipsis or isinstance(i, slice) for i in index):
        return None
    *others, last = every_axis(index, example(user.args[0]).dim())
    if any(i != slice(None) for i in others) or any(isinstance(x, Node) for x in (last.start, last.stop, last.step)):
        return None
    start, stop, step = last.indices(width)
    return [(user, start, stop)] if step == 1 and stop > start else None
