"""How to read each operation as a formula over the indices of its result; see index_expr.py.

One rule an operation, by the name that the table of operations (`graph/op_traits.py`) gives it, with its arguments by
name. A rule that meets a form it does not know raises `NotReadable`, and the node becomes an unknown function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy import And, Not, Or, Piecewise
from torch.fx import Node

from zipvl_compile.passes.graph.op_traits import NAMES
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.masks.index_expr import (
    KEY,
    QUERY,
    Formula,
    NotReadable,
    Reader,
    Rule,
    axis,
    condition,
    is_condition,
    number,
)  # fmt: skip

Given = dict[str, Any]


def formula_of(node: Any) -> Formula:
    """Return the formula of a tensor node; at worst an unknown function of its axes."""
    return Reader(RULES).read(node)


def _pointwise(combine: Callable[..., Any]) -> Rule:
    def rule(reader: Reader, node: Node, given: Given) -> Formula:
        operands = [given.pop(name) for name in ("input", "other") if name in given]
        if any(value is not None for value in given.values()):  # alpha, out, rounding_mode
            raise NotReadable
        return Formula(combine(*map(reader.value, operands)), max(map(reader.rank, operands)))

    return rule


def _arithmetic(combine: Callable[..., Any]) -> Rule:
    return _pointwise(lambda *values: combine(*map(number, values)))


def _logic(combine: Callable[..., Any]) -> Rule:
    return _pointwise(lambda *values: combine(*map(condition, values)))


def _equal(a: Any, b: Any) -> Any:
    if is_condition(a) and is_condition(b):
        return sympy.Equivalent(a, b)
    return sympy.Eq(number(a), number(b))


def _arange(reader: Reader, node: Node, given: Given) -> Formula:
    # arange(end), arange(start, end), arange(start, end=end): one bound alone, given by place, is the end.
    start = given.get("start", 0) if "end" in given else 0
    step = 1 if given.get("step") is None else given["step"]
    return Formula(reader.value(start) + reader.value(step) * KEY, 1)


def _filled(filling: Any = None) -> Rule:
    """Read a tensor of one number, given here or as `fill_value`."""

    def rule(reader: Reader, node: Node, given: Given) -> Formula:
        fill = filling if filling is not None else given["fill_value"]
        return Formula(reader.value(fill), example(node).dim())

    return rule


def _tensor(reader: Reader, node: Node, given: Given) -> Formula:
    """Read `torch.tensor(number)`."""
    return Formula(reader.value(given["data"]), example(node).dim())


def _same(reader: Reader, node: Node, given: Given) -> Formula:
    """Read a cast, a copy or a broadcast, which change no value."""
    source = given["input"]
    old, new = example(source), example(node)
    value = reader.value(source)
    if new.dtype != torch.bool and is_condition(value):
        value = number(value)
    narrowing = old.dtype.is_floating_point and not new.dtype.is_floating_point and new.dtype != torch.bool
    if narrowing or new.dim() < old.dim():
        raise NotReadable
    return Formula(value, new.dim())


def _getitem(reader: Reader, node: Node, given: Given) -> Formula:
    source, index = given["input"], given["index"]
    if not isinstance(source, Node) or not isinstance(example(source), torch.Tensor):
        raise NotReadable
    index = index if isinstance(index, tuple) else (index,)
    formula = reader.formula(source)
    if any(isinstance(i, Node) and isinstance(example(i), torch.Tensor) for i in index):
        return _index(reader, formula, index)
    return _take_axes(reader, formula, index, example(node).dim())


def _index(reader: Reader, table: Formula, indices: Any) -> Formula:
    """Read `table[i, j, ...]` with a tensor for every axis."""
    if len(indices) != table.rank or any(not isinstance(i, Node) for i in indices):
        raise NotReadable
    if any(example(i).dtype == torch.bool for i in indices):
        raise NotReadable
    new = {axis(table.rank - 1 - place): reader.value(i) for place, i in enumerate(indices)}
    return Formula(table.value.subs(new, simultaneous=True), max(reader.rank(i) for i in indices))


def _aten_index(reader: Reader, node: Node, given: Given) -> Formula:
    return _index(reader, reader.formula(given["input"]), given["indices"])


def _take_axes(reader: Reader, source: Formula, index: tuple[Any, ...], rank: int) -> Formula:
    """Read an index of slices, numbers, None and Ellipsis."""
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    rest = [slice(None)] * (source.rank - used)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *rest, *index[at + 1 :])
    else:
        index = (*index, *rest)
    new: dict[Any, Any] = {}
    old, place = source.rank - 1, rank - 1
    for item in index:
        if item is None:
            place -= 1
            continue
        if isinstance(item, slice):
            start = reader.value(item.start) if item.start is not None else sympy.Integer(0)
            if item.step not in (None, 1) or not start.is_nonnegative:
                raise NotReadable
            new[axis(old)] = axis(place) + start
            place -= 1
        else:
            position = reader.value(item)
            if not position.is_nonnegative:
                raise NotReadable
            new[axis(old)] = position
        old -= 1
    return Formula(source.value.subs(new, simultaneous=True), rank)


def _unsqueeze(reader: Reader, node: Node, given: Given) -> Formula:
    source = reader.formula(given["input"])
    dim = given["dim"] % (source.rank + 1)
    return _take_axes(reader, source, (*[slice(None)] * dim, None), source.rank + 1)


def _transpose(reader: Reader, node: Node, given: Given) -> Formula:
    source = reader.formula(given["input"])
    a, b = (axis(source.rank - 1 - given[name] % source.rank) for name in ("dim0", "dim1"))
    return Formula(source.value.subs({a: b, b: a}, simultaneous=True), source.rank)


def _where(reader: Reader, node: Node, given: Given) -> Formula:
    where, yes, no = (reader.formula(given[name]) for name in ("condition", "input", "other"))
    value = Piecewise((number(yes.value), condition(where.value)), (number(no.value), True))
    return Formula(value, max(where.rank, yes.rank, no.rank))


def _masked_fill(reader: Reader, node: Node, given: Given) -> Formula:
    source, mask = reader.formula(given["input"]), reader.formula(given["mask"])
    value = Piecewise((number(reader.value(given["value"])), condition(mask.value)), (number(source.value), True))
    return Formula(value, max(source.rank, mask.rank))


def _triangle(keeps: Callable[[Any], Any]) -> Rule:
    def rule(reader: Reader, node: Node, given: Given) -> Formula:
        source, diagonal = reader.formula(given["input"]), reader.value(given.get("diagonal", 0))
        kept = keeps(KEY - QUERY - diagonal)
        value = source.value
        if is_condition(value):
            return Formula(And(value, kept), source.rank)
        return Formula(Piecewise((value, kept), (0, True)), source.rank)

    return rule


def _add_batch_dim(reader: Reader, node: Node, given: Given) -> Formula:
    """Read the entry of a vmap over axis `dim`: inside, that axis is a symbol of its own."""
    dim, level = given["dim"], given["level"]
    formula = reader.formula(given["input"])
    inside = (*[slice(None)] * (dim % formula.rank), 0)
    mark = axis(formula.rank - 1 - dim % formula.rank)
    held = Formula(formula.value.subs(mark, _level(level)), formula.rank)
    return _take_axes(reader, held, inside, formula.rank - 1)


def _remove_batch_dim(reader: Reader, node: Node, given: Given) -> Formula:
    """Read the exit of a vmap: its symbol becomes the axis `out_dim`."""
    level = given["level"]
    formula = reader.formula(given["input"])
    rank = formula.rank + 1
    place = given["out_dim"] % rank
    moved = _take_axes(reader, formula, (*[slice(None)] * place, None), rank)
    return Formula(moved.value.subs(_level(level), axis(rank - 1 - place)), rank)


def _level(level: Any) -> sympy.Symbol:
    return sympy.Symbol(f"vmap{level}", integer=True, nonnegative=True)


RULES: dict[str, Rule] = {
    "arange": _arange,
    "ones": _filled(1), "new_ones": _filled(1), "ones_like": _filled(1),
    "zeros": _filled(0), "new_zeros": _filled(0), "zeros_like": _filled(0),
    "tensor": _tensor, "scalar_tensor": _tensor, "full": _filled(), "new_full": _filled(), "full_like": _filled(),
    "add": _arithmetic(operator.add), "sub": _arithmetic(operator.sub), "rsub": _arithmetic(lambda a, b: b - a),
    "mul": _arithmetic(operator.mul), "neg": _arithmetic(operator.neg), "abs": _arithmetic(sympy.Abs),
    "floor_divide": _arithmetic(lambda a, b: sympy.floor(a / b)),
    "le": _arithmetic(sympy.Le), "lt": _arithmetic(sympy.Lt), "ge": _arithmetic(sympy.Ge),
    "gt": _arithmetic(sympy.Gt), "eq": _pointwise(_equal), "ne": _pointwise(lambda a, b: Not(_equal(a, b))),
    "bitwise_and": _logic(And), "bitwise_or": _logic(Or), "bitwise_not": _logic(Not), "logical_and": _logic(And),
    "logical_or": _logic(Or), "logical_not": _logic(Not),
    **dict.fromkeys(("to", "bool", "int", "long", "float", "type", "type_as", "clone", "contiguous"), _same),
    **dict.fromkeys(("detach", "expand", "double", "half", "bfloat16"), _same),
    "getitem": _getitem, "index": _aten_index, "unsqueeze": _unsqueeze, "transpose": _transpose,
    "where": _where, "masked_fill": _masked_fill,
    "triu": _triangle(lambda x: sympy.Ge(x, 0)), "tril": _triangle(lambda x: sympy.Le(x, 0)),
    "add_batch_dim": _add_batch_dim, "remove_batch_dim": _remove_batch_dim,
}  # fmt: skip
assert NAMES.issuperset(RULES), NAMES.symmetric_difference(RULES)
