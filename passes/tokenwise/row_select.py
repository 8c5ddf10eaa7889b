"""Some tokens of a tensor: taken from it, and put back.

index_select(x, axis, rows)                    the same rows for every sample: probe rows, or a batch of one
gather(x, axis, positions)                     the kept tokens of each sample
x[:, -1:]                                      a slice, or an index that is a tensor
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import insert_call, size
from zipvl_compile.passes.graph.op_calls import TokenPositionsCall
from zipvl_compile.passes.graph.reading import example, spelled
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes

_ALL = slice(None)


@dataclass(frozen=True)
class _Rows:
    """Rows `index`; what was taken or put further up the graph is not taken again, nor overwritten.

    take(put(rows, x)) = rows              put(rows, put(others, x)) = put(rows, x)
    """

    index: Node
    count: Any
    taken: dict[tuple[Node, Axes], Node] = field(default_factory=dict)
    under: dict[tuple[Node, Axes], Node] = field(default_factory=dict)

    def take(self, x: Node, axes: Axes, before: Node) -> Node:
        """Return the rows of `x`, inserted before a node."""
        key = x, axes
        if key not in self.taken or before < self.taken[key]:
            self.taken[key] = self._take(x, axes, before)
        return self.taken[key]

    def put(self, rows: Node, axes: Axes, base: Node, before: Node) -> Node:
        """Return `base` with `rows` in their places, inserted before a node."""
        base = self.under.get((base, axes), base)
        full = self._put(rows, axes, base, before)
        self.taken[full, axes], self.under[full, axes] = rows, base
        return full

    def _take(self, x: Node, axes: Axes, before: Node) -> Node:
        raise NotImplementedError

    def _put(self, rows: Node, axes: Axes, base: Node, before: Node) -> Node:
        raise NotImplementedError


class Shared(_Rows):
    """Rows `index`, int64 `[m]`, of every sample."""

    def _take(self, x: Node, axes: Axes, before: Node) -> Node:
        return insert_call(before, torch.index_select, (x, axes.token, self.index))

    def _put(self, rows: Node, axes: Axes, base: Node, before: Node) -> Node:
        return insert_call(before, torch.index_copy, (base, axes.token, self.index, rows))


class OfEachSample(_Rows):
    """Rows `index`, int64 `[B, P]`, of each sample its own; a tensor that all samples share gets an axis of samples."""

    def _take(self, x: Node, axes: Axes, before: Node) -> Node:
        assert axes.batch is not None
        if axes.joined:
            return insert_call(before, torch.index_select, (x, axes.token, self._of_all(x, axes, before)))
        missing = max(-axes.batch, 0)
        if missing:
            x = insert_call(before, operator.getitem, (x, (*[None] * missing, Ellipsis)))
        token, batch = axes.token + missing, max(axes.batch, 0)
        index = self._spread(example(x).dim(), token, batch, before)
        # Broadcast by hand: torch.take_along_dim compares the sizes, of which P is not known while compiling.
        sizes = [-1 if axis in (token, batch) else size(x, axis, before) for axis in range(example(x).dim())]
        if one_sample(x, batch):
            samples = [size(index, batch, before) if axis == batch else -1 for axis in range(len(sizes))]
            x = insert_call(before, torch.ops.aten.expand.default, (x, samples))
        return insert_call(
            before, torch.gather, (x, token, insert_call(before, torch.ops.aten.expand.default, (index, sizes)))
        )

    def _put(self, rows: Node, axes: Axes, base: Node, before: Node) -> Node:
        assert axes.batch is not None
        if axes.joined:
            return insert_call(before, torch.index_copy, (base, axes.token, self._of_all(base, axes, before), rows))
        index = self._spread(example(rows).dim(), axes.token, axes.batch, before)
        index = insert_call(before, torch.ops.aten.expand_as.default, (index, rows))
        return insert_call(before, torch.scatter, (base, axes.token, index, rows))

    def _of_all(self, x: Node, axes: Axes, before: Node) -> Node:
        """Return the rows of all samples `[B P]` where `x` has their tokens one sample after the other."""
        samples = size(self.index, 0, before)
        tokens = insert_call(before, operator.floordiv, (size(x, axes.token, before), samples))
        ones = insert_call(before, torch.ops.aten.new_ones.default, (self.index, (samples, 1)))
        numbers = insert_call(before, operator.sub, (insert_call(before, torch.cumsum, (ones, 0)), 1))
        starts = insert_call(before, operator.mul, (numbers, tokens))
        return insert_call(before, torch.flatten, (insert_call(before, torch.add, (self.index, starts)),))

    def _spread(self, axes: int, token: int, batch: int, before: Node) -> Node:
        index = self.index if batch < token else insert_call(before, torch.transpose, (self.index, 0, 1))
        where = tuple(_ALL if axis in (token, batch) else None for axis in range(axes))
        return insert_call(before, operator.getitem, (index, where))


@dataclass(frozen=True)
class Slice:
    """Rows `index` of every sample: a slice, or a node that holds an int64 tensor `[m]`."""

    index: Any

    def take(self, x: Node, axes: Axes, before: Node) -> Node:
        """Return the rows of `x`, inserted before a node.

        Raises:
            Mixes: `x` has the tokens of all samples on one axis.
        """
        if axes.joined:
            raise Mixes(f"{spelled(x)!r} has the tokens of all samples on one axis")
        return insert_call(before, operator.getitem, (x, (*[_ALL] * axes.token, self.index)))


def kept_rows(positions: Node) -> Shared | OfEachSample:
    """Return the rows at `positions [B, 1, P]` as select_tokens returned them."""
    before = positions.next
    return rows_of(positions, size(positions, 2, before), before)


def rows_of(index: Node, count: Any, before: Node) -> Shared | OfEachSample:
    """Return the `count` rows at `index [B, 1, count]`, inserted before a node."""
    if one_sample(index):
        return Shared(insert_call(before, operator.getitem, (index, (0, 0))), count)
    return OfEachSample(insert_call(before, operator.getitem, (index, (_ALL, 0))), count)


def token_positions(x: Node, rows: slice, before: Node) -> Node:
    """Insert the positions of some tokens of `x [B, H, n, D]`, int64 `[m]`, before a node."""
    every = TokenPositionsCall(k=x).insert(before)
    return insert_call(before, operator.getitem, (every, (0, 0, rows)))


def one_sample(x: Node, batch: int = 0) -> bool:
    """Return whether the axis `batch` of `x` is known to be 1."""
    return statically_known_true(example(x).shape[batch] == 1)
