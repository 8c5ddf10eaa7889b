"""Where a tensor has its tokens, and its samples: on two axes, or joined on one.

    x [B, n, C]  ──  x.view(B * n, C)  ──  router, experts  ──  .view(B, n, C)
      samples 0, tokens 1        both on axis 0, B samples of n tokens each

Models flatten what works on rows, and mixtures of experts always do. A reshape that joins the two axes moves no row, so
a row of the one form is a row of the other; how many samples there are says where each begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.op_kinds import Tokens
from zipvl_compile.passes.graph.reading import is_op, of, product, written


@dataclass(frozen=True)
class Axes:
    """Where a tensor has its tokens and, if samples take different rows, its samples; below 0: it has no such axis.

    Attributes:
        token: the axis of the tokens.
        batch: that of the samples; the same one where it holds the tokens of one sample after those of another.
        samples: how many there are, of joined axes: a number, or a symbol.
    """

    token: int
    batch: int | None = None
    samples: Any = field(default=None, compare=False)

    @property
    def joined(self) -> bool:
        return self.batch == self.token


def reshaped(node: Node, source: torch.Tensor, axes: Axes, result: torch.Tensor) -> Axes | None:
    """Return where `result` has what `source` has on `axes`, where a reshape joins or parts the two; else None.

    It may be read either way: from the input of a call to its result, or back.

    Args:
        node: the call that reshapes the one into the other.
        source: a tensor.
        axes: of that.
        result: the other tensor.
    """
    op = of(node)
    if axes.batch is None or op is None or op.tokens is not Tokens.RESHAPE or written(node):
        return None
    if not is_op(node, "view", "reshape", "flatten"):
        return None
    if not axes.joined:
        place = _joined(source.shape, axes, result.shape)
        return None if place is None else Axes(place, place, source.shape[axes.batch])
    for batch in range(result.dim() - 1):
        parted = Axes(batch + 1, batch)
        if _same(result.shape[batch], axes.samples) and _joined(result.shape, parted, source.shape) == axes.token:
            return parted
    return None


def _joined(parted: torch.Size, axes: Axes, joined: torch.Size) -> int | None:
    """Return the axis of a shape that holds the two `axes` of another, tokens right after samples."""
    batch, token = axes.batch, axes.token
    if batch is None or batch < 0 or token != batch + 1:
        return None
    before, both = product(parted[:batch]), parted[batch] * parted[token]
    for place in range(len(joined)):
        if _same(joined[place], both) and _same(product(joined[:place]), before):
            return place
    return None


def _same(one: Any, other: Any) -> bool:
    return statically_known_true(one == other)
