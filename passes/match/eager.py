"""Attention written out as matrix products around a softmax.

    out = matmul(dropout(softmax(mask(softcap(scale * matmul(q, k.T)))).to(dtype)), v)

with every step but the products and the softmax optional. The products may be `matmul`, `@`, `bmm`, `baddbmm` (whose
first term is then the mask) or `einsum`; the mask `+ mask`, `where(mask, scores, -inf)` or `masked_fill(mask, -inf)`;
batch and heads two axes or one. `read` starts at the softmax and walks both ways; the first step that the form does
not have is the `Differs` it raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.reading import arguments, example, is_op, same_shape, spelled
from zipvl_compile.passes.masks.mask_form import HIDDEN_BELOW
from zipvl_compile.passes.match.attention_site import Attention
from zipvl_compile.passes.match.sdpa import Differs, with_plain_heads

NAME = "eager attention"
_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_SCALES, _DIVISIONS = ("mul", "mul_"), ("div", "div_")


def is_softmax(node: Node) -> bool:
    """Return whether `node` is a softmax over the last axis of a tensor of 3 or 4 axes."""
    if not is_op(node, "softmax"):
        return False
    scores, dim = example(node), arguments(node).get("dim")
    return isinstance(scores, torch.Tensor) and scores.dim() in (3, 4) and dim in (-1, scores.dim() - 1)


@dataclass
class _Scores:
    """What lies between the product of queries and keys and the softmax, as far as the walk has come."""

    scale: float = 1.0
    softcap: float | None = None
    mask: Node | None = None
    mask_hides: bool = False
    interior: list[Node] = field(default_factory=list)

    def set_mask(self, mask: Any, hides: bool) -> None:
        if self.mask is not None:
            raise Differs("two terms are added to the scores")
        if self.scale != 1.0 or self.softcap is not None:
            raise Differs("the mask is added before the scores are scaled")
        if not isinstance(mask, Node):
            raise Differs("a number is added to the scores")
        self.mask, self.mask_hides = mask, hides


def read(softmax: Node) -> Attention:
    """Return the attention around a softmax.

    Raises:
        Differs: the graph around it has another form.
    """
    scores = _Scores()
    weights, output, value, dropout = _after(softmax)
    product = _before(arguments(softmax)["input"], scores)
    query, key_transposed = _factors(product, scores)
    key, transposes = _untransposed(key_transposed)
    merged = example(output).dim() == 3
    if merged:
        heads = [_with_heads(x) for x in (query, key, value)]
        query, key, value = (x for x, _ in heads)
        transposes += [reshape for _, reshape in heads]
    q, k, v, out = (example(x) for x in (query, key, value, output))
    if any(x.dim() != 4 for x in (q, k, v)):
        raise Differs("inputs are not [batch, heads, tokens, head_dim]")
    if not q.dtype == k.dtype == v.dtype == out.dtype:
        raise Differs(f"the output is {out.dtype}, the queries {q.dtype}")
    wanted = (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    if not same_shape(out.shape, (wanted[0] * wanted[1], *wanted[2:]) if merged else wanted):
        raise Differs(f"the output has shape {list(out.shape)}, not {list(wanted)}")
    return with_plain_heads(Attention(
        node=output, query=query, key=key, value=value, mask=scores.mask, mask_hides=scores.mask_hides,
        is_causal=False, scale=scores.scale, softcap=scores.softcap, dropout=dropout, inputs=(key, value),
        interior=(*weights, *scores.interior, product, *transposes), merged=merged,
    ))  # fmt: skip


def _after(softmax: Node) -> tuple[list[Node], Node, Node, float]:
    """Walk from the softmax to the product with the values; return the nodes between, the product, V and dropout."""
    node, between, dropout = softmax, [softmax], 0.0
    while True:
        if len(node.users) != 1:
            raise Differs(f"the attention weights are read {len(node.users)} times, not once")
        (user,) = node.users
        if is_op(user, *_CASTS) and arguments(user)["input"] is node:
            pass
        elif is_op(user, "dropout"):
            given = arguments(user)
            dropout = given.get("p", 0.5) if given.get("training", True) else 0.0
        elif is_op(user, "matmul", "bmm", "einsum"):
            return between[::-1], user, _other_factor(user, node), dropout
        else:
            name = spelled(user) if user.op != "output" else "output"
            raise Differs(f"the attention weights go through {name!r} before the values")
        between.append(user)
        node = user


def _other_factor(product: Node, weights: Node) -> Node:
    """Return V of `weights @ V`."""
    if is_op(product, "einsum"):
        left, right = _einsum(product, ("bhqk,bhkd->bhqd", "bqk,bkd->bqd"))
    else:
        left, right = _operands(product)
    if left is not weights or not isinstance(right, Node):
        raise Differs("the attention weights are not the left factor of a product with values")
    return right


def _operands(node: Node) -> tuple[Any, Any]:
    given = arguments(node)
    return given["input"], given["other"]


def _before(node: Any, found: _Scores) -> Node:
    """Walk from the softmax up to the product of queries and keys, noting scale, softcap and mask."""
    while True:
        if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
            raise Differs("no product of queries and keys above the softmax")
        if len(node.users) != 1:
            raise Differs("the scores are read elsewhere, too")
        if is_op(node, *_PRODUCTS):
            return node
        found.interior.append(node)
        node = _step(node, found)


def _step(node: Node, found: _Scores) -> Any:
    """Note what one node does to the scores; return its input."""
    if is_op(node, *_CASTS):
        return arguments(node)["input"]
    if is_op(node, "add", "add_"):
        left, right = _operands(node)
        scores, mask = (left, right) if _leads_to_product(left) else (right, left)
        if arguments(node).get("alpha", 1) != 1:
            raise Differs("what is added to the scores is multiplied by alpha")
        found.set_mask(mask, hides=False)
        return scores
    if is_op(node, "where"):
        given = arguments(node)
        _check_fill(given["other"])
        found.set_mask(given["condition"], hides=False)
        return given["input"]
    if is_op(node, "masked_fill", "masked_fill_"):
        given = arguments(node)
        _check_fill(given["value"])
        found.set_mask(given["mask"], hides=True)
        return given["input"]
    if is_op(node, *_SCALES, *_DIVISIONS):
        source, factor = _scaled(node)
        if is_op(source, "tanh"):
            return _softcapped(source, factor, found)
        found.scale *= factor
        return source
    raise Differs(f"the scores go through {spelled(node)!r} before the softmax")


def _scaled(node: Node) -> tuple[Any, float]:
    left, right = _operands(node)
    divides = is_op(node, *_DIVISIONS)
    if not divides and _number(right) is None:
        left, right = right, left
    factor = _number(right)
    if factor is None or arguments(node).get("rounding_mode") is not None:
        raise Differs("the scores are multiplied by a tensor")
    return left, 1.0 / factor if divides else factor


def _number(x: Any) -> float | None:
    """Return a constant; one that Dynamo made symbolic becomes a guard."""
    x = example(x)
    return float(x) if isinstance(x, (int, float, torch.SymFloat)) else None


def _softcapped(tanh: Node, softcap: float, found: _Scores) -> Any:
    """Match `tanh(scores / c) * c`."""
    inner = arguments(tanh)["input"]
    if not is_op(inner, *_SCALES, *_DIVISIONS):
        raise Differs("the scores go through 'tanh' before the softmax")
    source, factor = _scaled(inner)
    if found.scale != 1.0 or abs(softcap * factor - 1.0) > 1e-6:
        raise Differs("tanh of the scores is not a softcap c * tanh(scores / c)")
    found.softcap = softcap
    found.interior += [tanh, inner]
    return source


def _check_fill(fill: Any) -> None:
    number = _filled_with(fill) if isinstance(example(fill), torch.Tensor) else _number(fill)
    if number is None or not number <= HIDDEN_BELOW:
        raise Differs(f"hidden scores are filled with {number}, not with -inf")


def _filled_with(node: Node) -> float | None:
    """Return the number in `torch.full([], number)`, `torch.tensor(number)` and casts of them."""
    while is_op(node, "to", "type") and isinstance(arguments(node)["input"], Node):
        node = arguments(node)["input"]
    if is_op(node, "full"):
        return _number(arguments(node)["fill_value"])
    return _number(arguments(node)["data"]) if is_op(node, "tensor", "scalar_tensor") else None


def _leads_to_product(node: Any) -> bool:
    """Return whether nothing but steps of the scores lies between `node` and a product."""
    steps = (*_CASTS, *_SCALES, *_DIVISIONS, "tanh", "add", "where", "masked_fill")
    while is_op(node, *_PRODUCTS, *steps):
        if is_op(node, *_PRODUCTS):
            return True
        given = arguments(node)
        node = given["input"] if isinstance(given["input"], Node) else given.get("other")
    return False


def _factors(product: Node, found: _Scores) -> tuple[Node, Node]:
    """Return queries and keys, the keys transposed except in an einsum."""
    if is_op(product, "einsum"):
        return _einsum(product, ("bhqd,bhkd->bhqk", "bqd,bkd->bqk"))
    if not is_op(product, "baddbmm"):
        return _operands(product)
    given = arguments(product)
    beta = given.get("beta", 1)
    if beta == 1:
        found.set_mask(given["input"], hides=False)
    elif beta != 0:
        raise Differs(f"baddbmm multiplies its mask by {beta}")
    found.scale *= _number(given.get("alpha", 1.0)) or 0.0
    return given["batch1"], given["batch2"]


def _einsum(node: Node, forms: tuple[str, ...]) -> tuple[Node, Node]:
    """Return the two operands of an einsum of one of the `forms`, whatever its letters."""
    given = arguments(node)
    equation, operands = str(given["equation"]).replace(" ", ""), given["operands"]
    letters: dict[str, str] = {}
    for form in forms:
        same = len(form) == len(equation)
        letters = dict(zip(equation, form, strict=True)) if same else {}
        if same and "".join(letters[c] for c in equation) == form and len(set(letters.values())) == len(letters):
            return tuple(operands)
    raise Differs(f"einsum {equation!r} is not {forms[0]!r}")


def _untransposed(node: Any) -> tuple[Node, list[Node]]:
    """Return K of `K.transpose(-1, -2)`; the keys of an einsum are not transposed."""
    if not isinstance(node, Node):
        raise Differs("no keys in the product above the softmax")
    rank = example(node).dim()
    last, before = rank - 1, rank - 2
    if len(node.users) == 1 and is_op(node, "transpose", "permute", "getattr"):
        given = arguments(node)
        if is_op(node, "transpose"):
            swaps = {given["dim0"] % rank, given["dim1"] % rank} == {last, before}
        elif is_op(node, "permute"):
            swaps = [d % rank for d in given["dims"]] == [*range(before), last, before]
        else:
            swaps = given["name"] == "mT"
        if swaps:
            return given["input"], [node]
    if any(is_op(user, "einsum") for user in node.users):
        return node, []
    raise Differs("the keys are not transposed right before the product")


def _with_heads(node: Node) -> tuple[Node, Node]:
    """Return `x [B, H, n, D]` of `x.reshape(B * H, n, D)`, and the reshape."""
    if is_op(node, "reshape", "view", "flatten"):
        source = arguments(node)["input"]
        x = example(source)
        if isinstance(source, Node) and x.dim() == 4:
            merged = (x.shape[0] * x.shape[1], *x.shape[2:])
            if same_shape(example(node).shape, merged):
                return source, node
    raise Differs("batch and heads are merged in a way that is not [batch, heads, ...].reshape(batch * heads, ...)")
