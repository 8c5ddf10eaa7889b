"""What is known of the values of a row, from what is known of the rows that it is computed from.

    0  ->  x.pow(2).mean(-1) + 1e-6     = 1e-6       ->  rsqrt   = 1000         ->  x * rsqrt(...)   = 0
    0  ->  linear(x, w, bias)           = any        ->  rsqrt                   refused: it may divide by zero
    0  ->  x / x.abs().amax(-1)                                                  refused: 0 / 0

An interval `(low, high)` holds every element of the row, and every element is finite; an infinite end says that it is
not bounded. What an operation does at the ends is computed by the operation itself, in the dtype of its operands: in
half precision 0 + 1e-8 is 0. Weights and tensors that do not come from the row are finite and, as divisors, not zero,
as the model divides all other rows by them, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from zipvl_compile.passes.graph.op_kinds import Values
from zipvl_compile.passes.graph.private import leaves
from zipvl_compile.passes.graph.reading import arguments, example, holds_subclass, holds_tensors, is_op, of, spelled
from zipvl_compile.passes.tokenwise import opaque_weight
from zipvl_compile.passes.tokenwise.axis_rules import Mixes

Interval = tuple[float, float]
Given = dict[Node, Interval]
ZERO: Interval = (0.0, 0.0)
ANY: Interval = (-math.inf, math.inf)
SLACK = 0.01  # relative; sums round


def below(node: Node, given: Given) -> Interval:
    """Return what is known of a row of `node`, from the same rows of its inputs `given`.

    Raises:
        Mixes: the row may hold NaN or an infinity.
    """
    op = of(node)
    values = Values.UNKNOWN if op is None else op.values
    if values is Values.UNKNOWN:
        raise Mixes(f"what {spelled(node)!r} makes of a row of zeros is not known")
    try:
        low, high = _RULES[values](node, given, arguments(node))
        return _in_its_dtype(node, low, high)
    except Mixes:
        raise
    except Exception as error:  # a form of the call that its rule was not written for
        raise Mixes(f"{spelled(node)!r} is called in an unknown way ({type(error).__name__}: {error})") from error


def _in_its_dtype(node: Node, low: float, high: float) -> Interval:
    dtype = next(x.dtype for x in leaves(example(node)) if isinstance(x, torch.Tensor))
    if dtype.is_floating_point:
        ends = torch.tensor([low, high], dtype=torch.float64, device="cpu").to(dtype).tolist()
        for end, rounded in zip((low, high), ends, strict=True):
            _check(node, [end], rounded)
        return ends[0], ends[1]
    if dtype is torch.bool:
        return ZERO if (low, high) == ZERO else (0.0, 1.0)
    return (low, high) if low == high and float(low).is_integer() else ANY  # others may wrap around


def _check(node: Node, ends: list[float], result: float) -> None:
    if math.isnan(result) or (math.isinf(result) and all(map(math.isfinite, ends))):
        raise Mixes(f"{spelled(node)!r} of a row of zeros is not finite")


def _at(node: Node, values: dict[Node, float]) -> float:
    """Return what a node computes where its inputs hold these numbers."""

    def number(x: Node) -> torch.Tensor:
        fake = example(x)
        shape = [1] * min(fake.dim(), 1)
        if math.isinf(values[x]) and not fake.dtype.is_floating_point:
            raise Mixes(f"what {spelled(node)!r} makes of a row of zeros is not known")
        return torch.full(shape, values[x], dtype=torch.float64, device="cpu").to(fake.dtype)

    args, kwargs = map_arg(node.args, number), map_arg(node.kwargs, number)
    if node.op == "call_method":
        return float(getattr(args[0], str(node.target))(*args[1:], **kwargs))
    return float(node.target(*args, **kwargs))  # type: ignore[operator]


def _only(node: Node, given: Given) -> tuple[Node, Interval]:
    """Return the one tensor that a call reads, and what is known of it."""
    ((x, interval),) = given.items()
    if sum(map(holds_tensors, node.all_input_nodes)) != 1:
        raise Mixes(f"what {spelled(node)!r} makes of a row of zeros is not known")
    return x, interval


def _kept(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    """Several operands are chosen from or joined: the row may be of any of them."""
    if is_op(node, "cat", "stack"):
        parts = list(named["tensors"])
    elif is_op(node, "where", "masked_fill"):
        parts = [named["input"], named.get("other", named.get("value"))]
    else:
        parts = [named["input"]]
    found = [_interval(x, given) for x in parts]
    for low, high in found:
        if low == high:
            _check(node, [], low)
    return min(low for low, _ in found), max(high for _, high in found)


def _interval(x: Any, given: Given) -> Interval:
    if isinstance(x, Node):
        return given.get(x, ANY)
    return float(x), float(x)


def _monotone(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    x, ends = _only(node, given)
    results = []
    for end in ends:
        results.append(_at(node, {x: end}))
        _check(node, [end], results[-1])
    return min(results), max(results)


def _even(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    _, (low, high) = _only(node, given)
    (x,) = given
    ends = (0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high)))
    return _monotone(node, {x: ends}, named)


def _curve(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    _, (low, high) = _only(node, given)
    return _monotone(node, given, named) if low == high else ANY


def _pole(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    _, (low, high) = _only(node, given)
    if low <= 0 <= high:
        raise Mixes(f"{spelled(node)!r} may divide a row of zeros by zero")
    return _monotone(node, given, named)


def _terms(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    """The largest and the smallest result are at ends of the operands."""
    left, right = named["input"], named["other"]
    ends = {x: given.get(x, ANY) for x in (left, right) if isinstance(x, Node)}
    if left is right and is_op(node, "mul"):
        low, high = ends[left]
        squares = [low * low, high * high]
        return (0.0 if low <= 0 <= high else min(squares)), max(squares)
    corners: list[dict[Node, float]] = [{}]
    for x, pair in ends.items():
        corners = [corner | {x: end} for corner in corners for end in pair]
    results = []
    for corner in corners:
        result = _at(node, corner)
        if math.isnan(result) and any(map(math.isinf, corner.values())):
            result = 0.0 if is_op(node, "mul") else math.nan  # zero times what is finite, without a bound
        else:
            _check(node, list(corner.values()), result)
        results.append(result)
    numbers = [result for result in results if not math.isnan(result)]
    return min(numbers), max(numbers)


def _quotient(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    below, above = named["other"], named["input"]
    if isinstance(below, Node) and below not in given:
        return ZERO if _interval(above, given) == ZERO else ANY
    low, high = _interval(below, given)
    if low <= 0 <= high:
        raise Mixes(f"{spelled(node)!r} may divide a row of zeros by zero")
    return _terms(node, given, named) if not isinstance(above, Node) or above in given else ANY


def _power(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    exponent = named["exponent"]
    _, (low, high) = _only(node, given)
    if isinstance(named["input"], Node) and isinstance(exponent, (int, float)):
        if low == high or low >= 0:
            return _monotone(node, given, named)
        if exponent > 0 and exponent % 2 == 0:
            return _even(node, given, named)
    raise Mixes(f"what {spelled(node)!r} makes of a row of zeros is not known")


def _linear(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    x = named.get("mat1", named["input"])
    if set(given) != {x}:
        raise Mixes(f"{spelled(node)!r} multiplies rows of zeros with each other")
    if holds_subclass(node):
        return opaque_weight.walk(node, given[x], below)
    plain = given[x] == ZERO and named.get("bias") is None and "mat1" not in named
    return ZERO if plain else ANY


def _norm(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    eps = named.get("eps", 1e-5)
    if set(given) != {named["input"]} or (eps is not None and torch.tensor(eps, dtype=torch.float32) <= 0):
        raise Mixes(f"{spelled(node)!r} may divide a row of zeros by zero")
    return ZERO if given[named["input"]] == ZERO and named.get("bias") is None else ANY


def _mean(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    _, (low, high) = _only(node, given)
    return low - SLACK * abs(low), high + SLACK * abs(high)


def _sum(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    _, (low, high) = _only(node, given)
    return (low - SLACK * low if low >= 0 else -math.inf), (high - SLACK * high if high <= 0 else math.inf)


def _spread(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    return ZERO if _only(node, given)[1] == ZERO else (0.0, math.inf)


def _unit(node: Node, given: Given, named: dict[str, Any]) -> Interval:
    return 0.0, 1.0


_RULES: dict[Values, Callable[[Node, Given, dict[str, Any]], Interval]] = {
    Values.KEPT: _kept,
    Values.MONOTONE: _monotone,
    Values.EVEN: _even,
    Values.CURVE: _curve,
    Values.POLE: _pole,
    Values.TERMS: _terms,
    Values.QUOTIENT: _quotient,
    Values.POWER: _power,
    Values.LINEAR: _linear,
    Values.NORM: _norm,
    Values.MEAN: _mean,
    Values.SUM: _sum,
    Values.SPREAD: _spread,
    Values.UNIT: _unit,
}
