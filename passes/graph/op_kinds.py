"""What is told of an operation: how it carries the token axis, what is known of its values, and what it writes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any


class Tokens(Enum):
    """How an operation carries the token axis; the rules are in `tokenwise/axis_rules.py`."""

    POINTWISE = auto()  # operands broadcast
    FIRST = auto()  # like the first operand; others give a dtype or a number
    DROPOUT = auto()
    FEATURES = auto()  # every axis but the last
    NORM = auto()
    MATMUL = auto()
    ALONG = auto()  # every axis but `dim`
    CHOOSE = auto()  # the same, of several tensors
    REDUCE = auto()
    TRANSPOSE = auto()
    PERMUTE = auto()
    RESHAPE = auto()
    EXPAND = auto()
    CUT = auto()  # along another axis
    UNBIND = auto()
    GETITEM = auto()
    CAT = auto()
    STACK = auto()
    REPEAT = auto()
    FRESH = auto()
    COPY = auto()
    EXPERTS = auto()  # the first axis of the first tensors: see `graph/experts.py`


class Values(Enum):
    """How the values of a row follow from those of the operands' rows; the rules are in `tokenwise/row_values.py`."""

    UNKNOWN = auto()  # they may be anything, NaN included
    KEPT = auto()  # moved, repeated, chosen or cast
    MONOTONE = auto()
    EVEN = auto()
    CURVE = auto()  # finite for whatever is finite
    POLE = auto()  # monotone on either side of 0
    TERMS = auto()  # monotone in each operand
    QUOTIENT = auto()
    POWER = auto()
    LINEAR = auto()
    NORM = auto()
    MEAN = auto()
    SUM = auto()
    SPREAD = auto()
    UNIT = auto()  # between 0 and 1


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: what rules and messages call it; in-place forms end in "_".
        arguments: names in order; `*name` takes all that follow, as `view(*size)` does.
        tokens, values: see there; None: tokens may mix.
        view: a result may share memory with any tensor that the call was given; else only with those it writes to.
        writes: names of the arguments that it writes to.
        outs: names of the arguments that it writes to where they are given.
        typed: names of the arguments of which it reads the dtype only.
        sizes: the result is a size or a number of axes.
        effect: does something besides its result, such as entering a vmap.
        signatures: names of the arguments of single targets that have others.
    """

    name: str
    arguments: tuple[str, ...]
    tokens: Tokens | None = None
    values: Values = Values.UNKNOWN
    view: bool = False
    writes: tuple[str, ...] = ()
    outs: tuple[str, ...] = ("out",)
    typed: tuple[str, ...] = ()
    sizes: bool = False
    effect: bool = False
    signatures: dict[Any, tuple[str, ...]] = field(default_factory=dict, compare=False)
