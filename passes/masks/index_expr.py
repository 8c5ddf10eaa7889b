"""Tensors read as formulas over their own indices.

A node of rank r becomes a sympy expression over the index symbols of its axes, counted from the right (KEY is the last
axis, QUERY the one before), so that broadcasting needs no work:

    arange(n)                 KEY
    x[None, :, None]          formula of x with KEY replaced by QUERY
    x <= y                    formula of x <= formula of y
    table[i, j]               formula of table with its axes replaced by the formulas of i and j
    anything else             an unknown function of its axes, `tensors` says of which node

An axis of size 1 has index 0. Nodes that are changed in place, through whatever view, are unknown functions, and so is
what a rule cannot read or fails on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy import Ne, Piecewise
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.reading import arguments, changed_in_place, example, of

log = logging.getLogger("zipvl_compile")
KEY, QUERY, HEAD, BATCH = AXES = sympy.symbols("key query head batch", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Formula:
    """The value of a tensor at one index.

    Attributes:
        value: sympy expression or condition over the axes.
        rank: of the tensor.
        tensors: the node behind each unknown function in `value`.
        nodes: every node that was read as part of the formula, unknown ones excluded.
    """

    value: Any
    rank: int = 0
    tensors: dict[Any, Node] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()


class NotReadable(Exception):
    """The node is an unknown function."""


def axis(i: int) -> sympy.Symbol:
    """Return the symbol of the i-th axis from the right, from 0."""
    return AXES[i] if i < len(AXES) else sympy.Symbol(f"axis{i}", integer=True, nonnegative=True)


def is_condition(value: Any) -> bool:
    return isinstance(value, (sympy.logic.boolalg.Boolean, bool)) and not isinstance(value, sympy.Symbol)


def number(value: Any) -> Any:
    """Return a condition as 1 and 0."""
    return Piecewise((1, value), (0, True)) if is_condition(value) else value


def condition(value: Any) -> Any:
    return value if is_condition(value) else Ne(value, 0)


class Reader:
    """Reads one graph region; remembers what it read."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        """Take the rules by the names that `graph/op_traits.py` gives to operations."""
        self.rules = rules
        self.known: dict[Node, Formula] = {}
        self.tensors: dict[Any, Node] = {}
        self.nodes: list[Node] = []

    def read(self, node: Any) -> Formula:
        """Return the formula of `node`, with the tensors behind its unknown functions."""
        formula = self.formula(node)
        return Formula(formula.value, formula.rank, self.tensors, tuple(self.nodes))

    def formula(self, node: Any) -> Formula:
        if not isinstance(node, Node):
            return Formula(_constant(node))
        if node not in self.known:
            self.known[node] = self._read_node(node)
        return self.known[node]

    def _read_node(self, node: Node) -> Formula:
        value = example(node)
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            return Formula(_constant(value))
        op = of(node)
        rule = None if op is None else self.rules.get(op.name)
        if rule is not None and not changed_in_place(node):
            try:
                formula = _settled(rule(self, node, arguments(node)), value)
            except NotReadable:
                pass
            except Exception as error:  # a form of the call that the rule was not written for
                log.debug("zipvl cannot read %s: %s", node.format_node(), error)
            else:
                self.nodes.append(node)
                return formula
        if not isinstance(value, torch.Tensor):
            raise NotReadable
        whole = None if value.is_floating_point() else True
        function = sympy.Function(f"tensor{len(self.tensors)}", integer=whole, real=True)
        self.tensors[function] = node
        rank = value.dim()
        return _settled(Formula(function(*(axis(i) for i in reversed(range(rank)))), rank), value)

    def value(self, node: Any) -> Any:
        return self.formula(node).value

    def rank(self, node: Any) -> int:
        return self.formula(node).rank


def _constant(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, torch.SymFloat):
        return sympy.sympify(float(value))  # a guard: the constants of a mask do not change
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, (int, float)):
        return sympy.sympify(value)
    raise NotReadable


def _settled(formula: Formula, value: Any) -> Formula:
    """Put 0 for the index of every axis of size 1, and a condition where the tensor is bool."""
    result = formula.value
    if isinstance(value, torch.Tensor) and value.dim() == formula.rank:
        ones = [i for i, size in enumerate(reversed(value.shape)) if statically_known_true(size == 1)]
        result = result.subs({axis(i): 0 for i in ones}) if ones else result
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        result = condition(result)
    return Formula(result, formula.rank)


Rule = Callable[[Reader, Node, dict[str, Any]], Formula]
