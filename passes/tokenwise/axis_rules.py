"""Which axis holds the tokens, and which operations treat every token by itself.

An operation is row-wise along an axis of its output if each slice along it is computed from the same slice of its
inputs. A rule says so for one node, from the output up to the inputs (`token_axis.py` asks the right one):

    linear(x, w)[.., i, :]          from  x[.., i, :]                       along every axis but the last
    x.transpose(1, 2)[:, :, i]      from  x[:, i]
    (q * cos)[:, :, i]              from  q[:, :, i] and cos[.., i, :]      cos of size 1 there: from all of it
    x.mean(-1, keepdim=True)[:, i]  from  x[:, i]

The axis may be that of the tokens or that of the batch. The table of operations
(`graph/op_traits.py`) says which rule an operation follows; one that it does not know might mix tokens: `Mixes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.op_kinds import Tokens
from zipvl_compile.passes.graph.private import leaves
from zipvl_compile.passes.graph.reading import example, holds_tensors, is_op, product, spelled

FRESH = ("new_empty", "new_zeros", "new_ones")
SIZED = ("view", "reshape", "expand", *FRESH)  # calls that name the sizes of their result
Carried = dict[Node, int]


class Mixes(Exception):
    """Rows of the tensor are not known to depend on one token each; the message names the operation."""


def rank(node: Node) -> int:
    """Return the number of axes of a tensor, or of the first tensor of a tuple."""
    return next((x.dim() for x in leaves(example(node)) if isinstance(x, torch.Tensor)), 0)


def aligned(x: Node, node: Node, axis: int) -> int:
    """Return which axis of an operand broadcasting aligns with the output's `axis`; below 0 where it has none."""
    return example(x).dim() - (rank(node) - axis)


def _operands(node: Node) -> list[Node]:
    return [x for x in leaves((node.args, dict(node.kwargs))) if holds_tensors(x)]


def _pointwise(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    found = {}
    for x in _operands(node):
        own = aligned(x, node, axis)
        if own >= 0 and not statically_known_true(example(x).shape[own] == 1):
            found[x] = own
    return found


def _first(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    """Other operands give a dtype only."""
    return {given["input"]: axis}


def _dropout(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    if given.get("training", True) and given.get("p", 0.5) != 0:
        raise Mixes("dropout draws at random: the model is training")
    return {given["input"]: axis}


def _features(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    if axis == rank(node) - 1:
        raise Mixes(f"{spelled(node)!r} works along the tokens")
    return {given["input"]: axis}


def _norm(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    shape = given["normalized_shape"]
    if axis >= rank(node) - (len(shape) if isinstance(shape, (tuple, list)) else 1):
        raise Mixes(f"{spelled(node)!r} works along the tokens")
    return {given["input"]: axis}


def _matmul(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    first, second = given.get("mat1", given["input"]), given["other"]
    if "mat1" in given and example(given["input"]).dim() != 1:
        raise Mixes(f"{spelled(node)!r} adds more than a bias")
    if example(second).dim() != 2 or axis == rank(node) - 1 or example(first).dim() < 2:
        raise Mixes(f"{spelled(node)!r} may mix tokens")
    return {first: axis}


def _along(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    dim = given.get("dim", -1 if is_op(node, "topk") else None)
    if not isinstance(dim, int) or dim % rank(node) == axis:
        raise Mixes(f"{spelled(node)!r} works along the tokens")
    return {given["input"]: axis}


def _choose(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    """All tensors are indexed alike but along `dim`."""
    if given["dim"] % rank(node) == axis:
        raise Mixes(f"{spelled(node)!r} works along the tokens")
    tensors = _operands(node)
    if not all(statically_known_true(example(x).shape[axis] == example(node).shape[axis]) for x in tensors):
        raise Mixes(f"{spelled(node)!r} takes some of the tokens")
    return dict.fromkeys(tensors, axis)


def _reduce(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    source, dims = given["input"], given.get("dim")
    dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
    if not isinstance(dims, (tuple, list)) or not dims:
        raise Mixes(f"{spelled(node)!r} works along the tokens")
    reduced = {d % rank(source) for d in dims}
    left = [d for d in range(rank(source)) if given.get("keepdim") or d not in reduced]
    if left[axis] in reduced:
        raise Mixes(f"{spelled(node)!r} works along the tokens")
    return {source: left[axis]}


def _transpose(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    a, b = given["dim0"] % rank(node), given["dim1"] % rank(node)
    return {given["input"]: {a: b, b: a}.get(axis, axis)}


def _permute(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    return {given["input"]: given["dims"][axis] % rank(node)}


def _reshape(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    """The token axis stays whole, with equally many elements before it."""
    source = given["input"]
    if is_op(node, *SIZED):
        _check_sizes(node, given)
    old, new = example(source).shape, example(node).shape
    for place in range(len(old)):
        same = statically_known_true(old[place] == new[axis])
        if same and statically_known_true(product(old[:place]) == product(new[:axis])):
            return {source: place}
    raise Mixes(f"{spelled(node)!r} takes the token axis apart")


def _check_sizes(node: Node, given: dict[str, Any]) -> None:
    sizes = leaves(given.get("size"))
    if len(sizes) != rank(node) or "size" in node.kwargs or any(isinstance(size, torch.dtype) for size in sizes):
        raise Mixes(f"{spelled(node)!r} does not name its sizes")


def same_rows(source: Node, count: int, node: Node) -> int:
    """Return how many leading axes of a reshaped tensor count the rows that `count` of `source` do.

    Raises:
        Mixes: rows are taken apart or joined.
    """
    old, new = example(source).shape, example(node).shape
    for leading in range(len(new) + 1):
        same = statically_known_true(product(old[:count]) == product(new[:leading]))
        if same and statically_known_true(product(old[count:]) == product(new[leading:])):
            return leading
    raise Mixes(f"{spelled(node)!r} takes rows apart")


def _expand(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    source = given["input"]
    own = aligned(source, node, axis)
    _check_sizes(node, given)
    if own < 0 or not statically_known_true(example(source).shape[own] == example(node).shape[axis]):
        raise Mixes(f"{spelled(node)!r} repeats a token")
    return {source: own}


def _cut(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    source = given["input"]
    if given.get("dim", 0) % rank(source) == axis:
        raise Mixes(f"{spelled(node)!r} cuts the token axis")
    return {source: axis}


def _unbind(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    dim = given.get("dim", 0) % rank(given["input"])
    return {given["input"]: axis + (axis >= dim)}


def _getitem(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    source, index = given["input"], given["index"]
    if not isinstance(example(source), torch.Tensor):
        return {source: axis}  # one of the tensors of a split
    if isinstance(example(index), torch.Tensor) and example(index).dtype in (torch.int32, torch.int64):
        own = example(index).dim()  # rows of a table, as of an embedding
        return {index: axis} if axis < own else {source: 1 + axis - own}
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index):
        raise Mixes("an index that is a tensor may mix tokens")
    old, new = -1, -1
    for item in every_axis(index, rank(source)):
        old += item is not None
        new += item is None or isinstance(item, slice)
        if new == axis:
            if item not in (slice(None), slice(0, None)):
                raise Mixes("the token axis is indexed")
            return {source: old}
    raise Mixes("the token axis is indexed")


def every_axis(index: tuple, axes: int) -> list:
    """Return an index with one entry for each axis of the tensor: without Ellipsis, with the axes it leaves out."""
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    at = next((place for place, i in enumerate(index) if i is Ellipsis), len(index))
    return [*index[:at], *[slice(None)] * (axes - used), *index[at + 1 :]]


def _cat(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    if given.get("dim", 0) % rank(node) == axis:
        raise Mixes("'cat' joins tokens with others")
    return dict.fromkeys(given["tensors"], axis)


def _stack(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    dim = given.get("dim", 0) % rank(node)
    if dim == axis:
        raise Mixes("'stack' joins tokens with others")
    return dict.fromkeys(given["tensors"], axis - (axis > dim))


def _repeat(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    dim = given.get("dim")
    if not isinstance(dim, int) or not isinstance(given["repeats"], int) or dim % rank(node) == axis:
        raise Mixes("'repeat_interleave' repeats tokens")
    return {given["input"]: axis}


def _fresh(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    """An empty tensor that copies fill: its first argument, which gives a dtype, need not be computed in full."""
    source = given["input"]
    shape = example(source).shape
    _check_sizes(node, given)
    alike = axis < len(shape) and statically_known_true(shape[axis] == example(node).shape[axis])
    return {source: axis} if alike else {}


def _copy(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    filled = given["input"]
    return {filled: axis} | {x: a for x, a in _pointwise(node, axis, given).items() if x is not filled}


def _experts(node: Node, axis: int, given: dict[str, Any]) -> Carried:
    if axis != 0:
        raise Mixes(f"{spelled(node)!r} has its tokens on the first axis")
    return dict.fromkeys(given["tensors"][: node.target.tokens], 0)  # type: ignore[union-attr]


RULES: dict[Tokens, Callable[[Node, int, dict[str, Any]], Carried]] = {
    Tokens.POINTWISE: _pointwise,
    Tokens.FIRST: _first,
    Tokens.DROPOUT: _dropout,
    Tokens.FEATURES: _features,
    Tokens.NORM: _norm,
    Tokens.MATMUL: _matmul,
    Tokens.ALONG: _along,
    Tokens.CHOOSE: _choose,
    Tokens.REDUCE: _reduce,
    Tokens.TRANSPOSE: _transpose,
    Tokens.PERMUTE: _permute,
    Tokens.RESHAPE: _reshape,
    Tokens.EXPAND: _expand,
    Tokens.CUT: _cut,
    Tokens.UNBIND: _unbind,
    Tokens.GETITEM: _getitem,
    Tokens.CAT: _cat,
    Tokens.STACK: _stack,
    Tokens.REPEAT: _repeat,
    Tokens.FRESH: _fresh,
    Tokens.COPY: _copy,
    Tokens.EXPERTS: _experts,
}
