"""How to read each operation as a formula over the indices of its result; see index_formula.py.

One rule an operation, by the name that `graph_edit.op_name` gives it. A rule that meets a form it does not know raises
`NotReadable`, and the node becomes an unknown function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy import And, Not, Or, Piecewise
from torch.fx import Node

from zipvl_compile.passes.graph.graph import args_of, arguments, example
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


def formula_of(node: Any) -> Formula:
    """Return the formula of a tensor node; at worst an unknown function of its axes."""
    return Reader(_RULES).read(node)


def _pointwise(combine: Callable[..., Any]) -> Rule:
    def rule(reader: Reader, node: Node) -> Formula:
        if node.kwargs:
            raise NotReadable
        return Formula(
            combine(*(reader.value(arg) for arg in args_of(node))), max(reader.rank(arg) for arg in args_of(node))
        )

    return rule


def _arithmetic(combine: Callable[..., Any]) -> Rule:
    return _pointwise(lambda *values: combine(*map(number, values)))


def _logic(combine: Callable[..., Any]) -> Rule:
    return _pointwise(lambda *values: combine(*map(condition, values)))


def _equal(a: Any, b: Any) -> Any:
    if is_condition(a) and is_condition(b):
        return sympy.Equivalent(a, b)
    return sympy.Eq(number(a), number(b))


def _arange(reader: Reader, node: Node) -> Formula:
    bounds = [reader.value(arg) for arg in args_of(node)] or [reader.value(node.kwargs["end"])]
    start = bounds[0] if len(bounds) > 1 else sympy.Integer(0)
    step = bounds[2] if len(bounds) > 2 else sympy.Integer(1)
    if {"start", "step"} & set(node.kwargs):
        raise NotReadable
    return Formula(start + step * KEY, 1)


def _filled(filling: Any = None) -> Rule:
    """Read a tensor of one number, given here or as `fill_value`, the last positional argument of `full`."""

    def rule(reader: Reader, node: Node) -> Formula:
        fill = filling if filling is not None else node.kwargs.get("fill_value", args_of(node)[-1])
        return Formula(reader.value(fill), example(node).dim())

    return rule


def _tensor(reader: Reader, node: Node) -> Formula:
    """Read `torch.tensor(number)`."""
    return Formula(reader.value(arguments(node, "data")["data"]), example(node).dim())


def _same(reader: Reader, node: Node) -> Formula:
    """Read a cast, a copy or a broadcast, which change no value."""
    source = args_of(node)[0]
    old, new = example(source), example(node)
    value = reader.value(source)
    if new.dtype != torch.bool and is_condition(value):
        value = number(value)
    narrowing = old.dtype.is_floating_point and not new.dtype.is_floating_point and new.dtype != torch.bool
    if narrowing or new.dim() < old.dim():
        raise NotReadable
    return Formula(value, new.dim())


def _getitem(reader: Reader, node: Node) -> Formula:
    source, index = args_of(node)
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


def _aten_index(reader: Reader, node: Node) -> Formula:
    return _index(reader, reader.formula(args_of(node)[0]), args_of(node)[1])


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


def _unsqueeze(reader: Reader, node: Node) -> Formula:
    given = arguments(node, "input", "dim")
    source = reader.formula(given["input"])
    dim = given["dim"] % (source.rank + 1)
    return _take_axes(reader, source, (*[slice(None)] * dim, None), source.rank + 1)


def _transpose(reader: Reader, node: Node) -> Formula:
    given = arguments(node, "input", "dim0", "dim1")
    source = reader.formula(given["input"])
    a, b = (axis(source.rank - 1 - given[name] % source.rank) for name in ("dim0", "dim1"))
    return Formula(source.value.subs({a: b, b: a}, simultaneous=True), source.rank)


def _where(reader: Reader, node: Node) -> Formula:
    where, yes, no = (reader.formula(arg) for arg in args_of(node))
    value = Piecewise((number(yes.value), condition(where.value)), (number(no.value), True))
    return Formula(value, max(where.rank, yes.rank, no.rank))


def _masked_fill(reader: Reader, node: Node) -> Formula:
    given = arguments(node, "input", "mask", "value")
    source, mask = reader.formula(given["input"]), reader.formula(given["mask"])
    value = Piecewise((number(reader.value(given["value"])), condition(mask.value)), (number(source.value), True))
    return Formula(value, max(source.rank, mask.rank))


def _triangle(keeps: Callable[[Any], Any]) -> Rule:
    def rule(reader: Reader, node: Node) -> Formula:
        given = arguments(node, "input", "diagonal")
        source, diagonal = reader.formula(given["input"]), reader.value(given.get("diagonal", 0))
        kept = keeps(KEY - QUERY - diagonal)
        value = source.value
        if is_condition(value):
            return Formula(And(value, kept), source.rank)
        return Formula(Piecewise((value, kept), (0, True)), source.rank)

    return rule


def _add_batch_dim(reader: Reader, node: Node) -> Formula:
    """Read the entry of a vmap over axis `dim`: inside, that axis is a symbol of its own."""
    source, dim, level = args_of(node)
    formula = reader.formula(source)
    inside = (*[slice(None)] * (dim % formula.rank), 0)
    mark = axis(formula.rank - 1 - dim % formula.rank)
    held = Formula(formula.value.subs(mark, _level(level)), formula.rank)
    return _take_axes(reader, held, inside, formula.rank - 1)


def _remove_batch_dim(reader: Reader, node: Node) -> Formula:
    """Read the exit of a vmap: its symbol becomes the axis `out_dim`."""
    source, level, _, out_dim = args_of(node)
    formula = reader.formula(source)
    rank = formula.rank + 1
    place = out_dim % rank
    moved = _take_axes(reader, formula, (*[slice(None)] * place, None), rank)
    return Formula(moved.value.subs(_level(level), axis(rank - 1 - place)), rank)


def _level(level: Any) -> sympy.Symbol:
    return sympy.Symbol(f"vmap{level}", integer=True, nonnegative=True)


def _casts(*names: str) -> dict[str, Callable]:
    return dict.fromkeys(names, _same)


_RULES: dict[str, Rule] = {
    "arange": _arange,
    "ones": _filled(1), "new_ones": _filled(1), "ones_like": _filled(1),
    "zeros": _filled(0), "new_zeros": _filled(0), "zeros_like": _filled(0),
    "tensor": _tensor, "full": _filled(), "new_full": _filled(), "full_like": _filled(),
    "add": _arithmetic(operator.add), "sub": _arithmetic(operator.sub), "rsub": _arithmetic(lambda a, b: b - a),
    "mul": _arithmetic(operator.mul), "neg": _arithmetic(operator.neg), "abs": _arithmetic(sympy.Abs),
    "floordiv": _arithmetic(lambda a, b: sympy.floor(a / b)),
    "floor_divide": _arithmetic(lambda a, b: sympy.floor(a / b)),
    "le": _arithmetic(sympy.Le), "lt": _arithmetic(sympy.Lt), "ge": _arithmetic(sympy.Ge),
    "gt": _arithmetic(sympy.Gt), "eq": _pointwise(_equal), "ne": _pointwise(lambda a, b: Not(_equal(a, b))),
    "and": _logic(And), "or": _logic(Or), "invert": _logic(Not), "logical_and": _logic(And),
    "logical_or": _logic(Or), "logical_not": _logic(Not), "bitwise_and": _logic(And), "bitwise_or": _logic(Or),
    **_casts("to", "bool", "int", "long", "float", "type", "type_as", "clone", "contiguous", "detach", "expand"),
    "getitem": _getitem, "index": _aten_index, "unsqueeze": _unsqueeze, "transpose": _transpose,
    "where": _where, "masked_fill": _masked_fill,
    "triu": _triangle(lambda x: sympy.Ge(x, 0)), "tril": _triangle(lambda x: sympy.Le(x, 0)),
    "_add_batch_dim": _add_batch_dim, "_remove_batch_dim": _remove_batch_dim,
}  # fmt: skip
