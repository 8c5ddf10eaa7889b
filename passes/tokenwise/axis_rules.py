"""Which axis holds the tokens, and which operations treat every token by itself.

An operation is row-wise along an axis of its output if each slice along it is computed from the same slice of its
inputs. `carried` says so for one node, from the output up to the inputs:

    linear(x, w)[.., i, :]          from  x[.., i, :]                       along every axis but the last
    x.transpose(1, 2)[:, :, i]      from  x[:, i]
    (q * cos)[:, :, i]              from  q[:, :, i] and cos[.., i, :]      cos of size 1 there: from all of it
    x.mean(-1, keepdim=True)[:, i]  from  x[:, i]

The axis may be that of the tokens or that of the batch. An operation that no rule knows might mix tokens: `Mixes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from zipvl_compile.passes.graph.graph import args_of, arguments, example, op_name

FRESH = ("new_empty", "new_zeros", "new_ones")
SIZED = ("view", "reshape", "expand", *FRESH)  # calls that name the sizes of their result
Carried = dict[Node, int]


class Mixes(Exception):
    """Rows of the tensor are not known to depend on one token each; the message names the operation."""


def carried(node: Node, axis: int) -> Carried:
    """Return the inputs of `node` that have the tokens of its output's `axis`, each with their axis.

    Inputs that are left out are the same for every token.

    Raises:
        Mixes: a token of the output may depend on several tokens of an input.
    """
    rule = _RULES.get(op_name(node)) if node.op in ("call_function", "call_method") else None
    if rule is None or not node.args or "out" in node.kwargs:
        raise Mixes(f"{op_name(node)!r} may mix tokens")
    return rule(node, axis)


def axis_below(node: Node, given: Carried) -> int:
    """Return the axis of `node`'s output that has the tokens of its inputs `given`.

    Raises:
        Mixes: there is none.
    """
    reason = Mixes(f"{op_name(node)!r} meets tokens on different axes")
    for axis in range(rank(node)):
        try:
            inputs = carried(node, axis)
        except Mixes as found:
            reason = found
            continue
        if all(inputs.get(x) == a for x, a in given.items()):
            return axis
    raise reason


def rank(node: Node) -> int:
    """Return the number of axes of a tensor, or of the first tensor of a tuple."""
    return next(x.dim() for x in tree_leaves(example(node)) if isinstance(x, torch.Tensor))


def holds_tensors(node: Any) -> bool:
    """Return whether a node is a tensor or has some, not a size."""
    return isinstance(node, Node) and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(example(node)))


def aligned(x: Node, node: Node, axis: int) -> int:
    """Return which axis of an operand broadcasting aligns with the output's `axis`; below 0 where it has none."""
    return example(x).dim() - (rank(node) - axis)


def _operands(node: Node) -> list[Node]:
    return [x for x in tree_leaves((node.args, dict(node.kwargs))) if holds_tensors(x)]


def _pointwise(node: Node, axis: int) -> Carried:
    found = {}
    for x in _operands(node):
        own = aligned(x, node, axis)
        if own >= 0 and not statically_known_true(example(x).shape[own] == 1):
            found[x] = own
    return found


def _like_first(node: Node, axis: int) -> Carried:
    """Other operands give a dtype only."""
    return {args_of(node)[0]: axis}


def _activation(node: Node, axis: int) -> Carried:
    if arguments(node, "input", "inplace").get("inplace") is True:
        raise Mixes(f"{op_name(node)!r} changes its input in place")
    return _like_first(node, axis)


def _dropout(node: Node, axis: int) -> Carried:
    given = arguments(node, "input", "p", "training", "inplace")
    if (given.get("training", True) and given.get("p", 0.5) != 0) or given.get("inplace"):
        raise Mixes("dropout draws at random: the model is training")
    return _like_first(node, axis)


def _by_features(node: Node, axis: int) -> Carried:
    if axis == rank(node) - 1:
        raise Mixes(f"{op_name(node)!r} works along the tokens")
    return {args_of(node)[0]: axis}


def _norm(node: Node, axis: int) -> Carried:
    shape = arguments(node, "input", "normalized_shape")["normalized_shape"]
    if axis >= rank(node) - (len(shape) if isinstance(shape, (tuple, list)) else 1):
        raise Mixes(f"{op_name(node)!r} works along the tokens")
    return {args_of(node)[0]: axis}


def _matmul(node: Node, axis: int) -> Carried:
    first, second = args_of(node)[:2]
    if example(second).dim() != 2 or axis == rank(node) - 1 or example(first).dim() < 2:
        raise Mixes(f"{op_name(node)!r} may mix tokens")
    return {first: axis}


def _softmax(node: Node, axis: int) -> Carried:
    dim = arguments(node, "input", "dim").get("dim")
    if not isinstance(dim, int) or dim % rank(node) == axis:
        raise Mixes(f"{op_name(node)!r} works along the tokens")
    return {args_of(node)[0]: axis}


def _reduce(node: Node, axis: int) -> Carried:
    given = arguments(node, "input", "dim", "keepdim")
    source, dims = given["input"], given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or (op_name(node) == "var" and len(node.args) > 2):  # var's third argument is another
        raise Mixes(f"{op_name(node)!r} works along the tokens")
    reduced = {d % rank(source) for d in dims}
    left = [d for d in range(rank(source)) if given.get("keepdim") or d not in reduced]
    if left[axis] in reduced:
        raise Mixes(f"{op_name(node)!r} works along the tokens")
    return {source: left[axis]}


def _transpose(node: Node, axis: int) -> Carried:
    given = arguments(node, "input", "dim0", "dim1")
    a, b = given["dim0"] % rank(node), given["dim1"] % rank(node)
    return {given["input"]: {a: b, b: a}.get(axis, axis)}


def _permute(node: Node, axis: int) -> Carried:
    source, *dims = args_of(node)
    order: Any = node.kwargs.get("dims", dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims)
    return {source: order[axis] % rank(node)}


def _reshape(node: Node, axis: int) -> Carried:
    """The token axis stays whole, with equally many elements before it."""
    source = args_of(node)[0]
    if op_name(node) in SIZED:
        _check_sizes(node)
    old, new = example(source).shape, example(node).shape
    for place in range(len(old)):
        same = statically_known_true(old[place] == new[axis])
        if same and statically_known_true(_product(old[:place]) == _product(new[:axis])):
            return {source: place}
    raise Mixes(f"{op_name(node)!r} takes the token axis apart")


def _check_sizes(node: Node) -> None:
    if len(tree_leaves(args_of(node)[1:])) != rank(node):
        raise Mixes(f"{op_name(node)!r} does not name its sizes")


def _product(sizes: Any) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _expand(node: Node, axis: int) -> Carried:
    source = args_of(node)[0]
    own = aligned(source, node, axis)
    _check_sizes(node)
    if own < 0 or not statically_known_true(example(source).shape[own] == example(node).shape[axis]):
        raise Mixes(f"{op_name(node)!r} repeats a token")
    return {source: own}


def _split(node: Node, axis: int) -> Carried:
    source, dim = args_of(node)[0], arguments(node, "input", "sizes", "dim").get("dim", 0)
    if dim % rank(source) == axis:
        raise Mixes(f"{op_name(node)!r} cuts the token axis")
    return {source: axis}


def _unbind(node: Node, axis: int) -> Carried:
    given = arguments(node, "input", "dim")
    dim = given.get("dim", 0) % rank(given["input"])
    return {given["input"]: axis + (axis >= dim)}


def _getitem(node: Node, axis: int) -> Carried:
    source, index = args_of(node)
    if not isinstance(example(source), torch.Tensor):
        return {source: axis}  # one of the tensors of a split
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


def _cat(node: Node, axis: int) -> Carried:
    given = arguments(node, "tensors", "dim")
    if given.get("dim", 0) % rank(node) == axis:
        raise Mixes("'cat' joins tokens with others")
    return dict.fromkeys(given["tensors"], axis)


def _stack(node: Node, axis: int) -> Carried:
    given = arguments(node, "tensors", "dim")
    dim = given.get("dim", 0) % rank(node)
    if dim == axis:
        raise Mixes("'stack' joins tokens with others")
    return dict.fromkeys(given["tensors"], axis - (axis > dim))


def _repeat_interleave(node: Node, axis: int) -> Carried:
    given = arguments(node, "input", "repeats", "dim")
    dim = given.get("dim")
    if not isinstance(dim, int) or not isinstance(given["repeats"], int) or dim % rank(node) == axis:
        raise Mixes("'repeat_interleave' repeats tokens")
    return {given["input"]: axis}


def _fresh(node: Node, axis: int) -> Carried:
    """An empty tensor that copies fill: its first argument, which gives a dtype, need not be computed in full."""
    source = args_of(node)[0]
    shape = example(source).shape
    _check_sizes(node)
    alike = axis < len(shape) and statically_known_true(shape[axis] == example(node).shape[axis])
    return {source: axis} if alike else {}


def _copy(node: Node, axis: int) -> Carried:
    return {args_of(node)[0]: axis} | {x: a for x, a in _pointwise(node, axis).items() if x is not args_of(node)[0]}


RESHAPES = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
_RULES: dict[str, Callable[[Node, int], Carried]] = {
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous"), _like_first),
    **dict.fromkeys(("clone", "detach", "neg", "pow", "rsqrt", "sqrt", "square", "exp", "abs", "erf"), _pointwise),
    **dict.fromkeys(("cos", "sin", "reciprocal", "clamp", "lt", "le", "gt", "ge", "eq", "ne"), _pointwise),
    **dict.fromkeys(("add", "sub", "mul", "truediv", "div", "where", "masked_fill"), _pointwise),
    **dict.fromkeys(("silu", "relu", "sigmoid", "tanh", "gelu", "softplus"), _activation),
    **dict.fromkeys(("mean", "sum", "var"), _reduce), **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("split", "chunk"), _split), "permute": _permute,
    **dict.fromkeys(("linear", "view_as_complex"), _by_features), "view_as_real": _like_first,
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm), **dict.fromkeys(("matmul", "mm"), _matmul),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat), **dict.fromkeys(FRESH, _fresh),
    "dropout": _dropout, "softmax": _softmax, "transpose": _transpose, "swapaxes": _transpose, "unbind": _unbind,
    "expand": _expand, "getitem": _getitem, "stack": _stack, "repeat_interleave": _repeat_interleave, "copy_": _copy,
}  # fmt: skip
