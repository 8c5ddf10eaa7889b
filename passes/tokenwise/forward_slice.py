"""What is computed below a tensor whose rows are zero but for a few, or copies of a few.

Attention gives zero to a token that was not selected. As long as the operations below treat every token by itself, all
those tokens come to one and the same row, which is computed once, or not at all where it is zero again:

    linear(0, w, None) = 0              linear(0, w, bias) = bias               0 * gate(h) = 0
    rms_norm(0) = 0                     rms_norm(bias) = one row for all of them

Where a token that was not selected holds the row of the kept one before it, whatever treats every token by itself gives
copies again, as long as it reads nothing that differs from token to token.

`find` follows the tensor downwards to where it meets tokens again, as in the residual connection.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.graph import erase_unread, insert_call, replace, size
from zipvl_compile.passes.graph.reading import (
    changed_in_place,
    example,
    holds_tensors,
    is_op,
    read_by_value,
    same_shape,
    spelled,
)
from zipvl_compile.passes.tokenwise import row_values
from zipvl_compile.passes.tokenwise.axes import Axes, reshaped
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import copy_for_rows, multiplies, reads_size
from zipvl_compile.passes.tokenwise.row_select import OfEachSample, Shared
from zipvl_compile.passes.tokenwise.row_values import ZERO, Interval
from zipvl_compile.passes.tokenwise.sole_readers import under_autocast
from zipvl_compile.passes.tokenwise.token_axis import axis_below, carried


@dataclass
class Below:
    """Row-wise operations below `start`, whose rows are zero but for the kept tokens', or copies of theirs.

    Attributes:
        held: the other rows are copies of kept tokens' rows.
        nodes: `start` and the operations, with their axes.
        values: what is known of their other rows: zero again, or one row that is the same for all tokens.
        others: by operation, the tensors with tokens of their own that it reads, such as a gate.
        stops: why it goes no lower, by node.
    """

    start: Node
    held: bool = False
    nodes: dict[Node, Axes] = field(default_factory=dict)
    values: dict[Node, Interval] = field(default_factory=dict)
    others: dict[Node, dict[Node, Axes]] = field(default_factory=dict)
    stops: dict[Node, str] = field(default_factory=dict)

    @property
    def zero(self) -> set[Node]:
        """Return those whose other rows are zero."""
        return {node for node, interval in self.values.items() if interval == ZERO}

    @property
    def results(self) -> list[Node]:
        """Return what is read from outside, in order."""
        return sorted(n for n in self.nodes if any(u not in self.nodes and not reads_size(u) for u in n.users))

    @property
    def projects(self) -> bool:
        return any(multiplies(node) for node in self.nodes)

    def replace(
        self, kept: Node, rows: Shared | OfEachSample, tokens: Any, held: Shared | OfEachSample | None = None
    ) -> None:
        """Compute the operations for the kept tokens, from their rows `kept` of `start`, and put the results back.

        Args:
            kept: `start` at the kept tokens, before `start` in the graph.
            rows: the kept tokens.
            tokens: how many there are in all, a number or a node.
            held: for each token, which of the kept ones it takes its row from, where it is `held`.
        """
        results = set(self.results)
        new = {self.start: kept}
        constant = {} if held is not None or results <= self.zero else {self.start: self._zero_row(kept)}
        for node, axes in sorted(self.nodes.items()):
            others = self.others.get(node, {})
            if node is not self.start:
                taken = {x: rows.take(x, own, node) for x, own in others.items()}
                new |= copy_for_rows({node: axes}, new | taken, rows.count, node)
            if constant and node is not self.start:
                if others:  # zero times anything
                    constant[node] = next(constant[x] for x in node.all_input_nodes if x in self.zero)
                else:
                    constant |= copy_for_rows({node: axes}, constant, 1, node)
            if node in results and held is not None:
                full = held.take(new[node], axes, node)
                for user in [user for user in node.users if user not in self.nodes and user is not full]:
                    user.replace_input_with(node, full)
            elif node in results:
                self._put_back(node, new[node], constant.get(node), rows, tokens)
        erase_unread(sorted(self.nodes, reverse=True))

    def _zero_row(self, kept: Node) -> Node:
        axes = range(example(kept).dim())
        sizes = [1 if axis == self.nodes[self.start].token else size(kept, axis, self.start) for axis in axes]
        return insert_call(self.start, torch.ops.aten.new_zeros.default, (kept, sizes))

    def _put_back(self, node: Node, kept: Node, other: Node | None, rows: Shared | OfEachSample, tokens: Any) -> None:
        axes = self.nodes[node]
        zero = node in self.zero or other is None
        if zero:
            for user in [user for user in node.users if user not in self.nodes]:
                if (residual := _added_to(user, node)) is not None:
                    taken = {residual: rows.take(residual, axes, user), node: kept}
                    total = insert_call(user, torch.add, tuple(taken[x] for x in user.all_input_nodes))
                    replace(user, rows.put(total, axes, residual, user))
                    erase_unread([user])
        users = [user for user in node.users if user not in self.nodes]
        if not users:
            return
        if axes.joined:
            tokens = insert_call(node, operator.mul, (size(rows.index, 0, node), tokens))
        sizes = [tokens if i == axes.token else size(kept, i, node) for i in range(example(node).dim())]
        if axes.joined and not zero:  # all samples have the same row
            other = insert_call(node, operator.getitem, (other, (*[slice(None)] * axes.token, slice(1))))
        if zero:
            base = insert_call(node, torch.ops.aten.new_zeros.default, (kept, sizes))
        else:
            base = insert_call(node, torch.ops.aten.expand.default, (other, sizes))
        full = rows.put(kept, axes, base, node)
        for user in users:
            user.replace_input_with(node, full)


def _added_to(user: Node, node: Node) -> Node | None:
    """Return the tensor that `user` does nothing but add `node` to, or None.

    It then gets the sums in its few rows; adding a tensor of zeros would read and write all the others once more.
    """
    return next((x for x in summands(user) if x is not node), None)


def summands(node: Node) -> list[Node]:
    """Return the two tensors that a node does nothing but add, both of its shape and dtype; none where it does not."""
    terms = list(node.all_input_nodes)
    if not is_op(node, "add") or len(terms) != 2 or len(node.args) != 2 or node.kwargs or changed_in_place(node):
        return []
    values = [example(x) for x in (node, *terms)]
    if not all(isinstance(x, torch.Tensor) for x in values):
        return []
    alike = all(x.dtype == values[0].dtype and same_shape(x.shape, values[0].shape) for x in values)
    return terms if alike else []


def follow(node: Node, known: dict[Node, Axes], autocast: set[Node]) -> tuple[Axes, dict[Node, Axes]]:
    """Follow tokens, and samples where they are followed, from the inputs of an operation to its result.

    Args:
        node: the operation.
        known: tensors above it, with their axes.
        autocast: the nodes inside `torch.autocast`.

    Returns:
        The axes of its result, and the other inputs with tokens of their own, with theirs.

    Raises:
        Mixes: a row of its result may depend on several rows, or cannot be computed elsewhere.
    """
    if node in autocast:
        raise Mixes(f"{spelled(node)!r} is inside torch.autocast")
    if changed_in_place(node) or any(holds_tensors(x) and changed_in_place(x) for x in node.all_input_nodes):
        raise Mixes(f"the result of {spelled(node)!r} is changed in place")
    given = {x: known[x] for x in read_by_value(node) if x in known}
    if len(given) == 1:
        ((x, above),) = given.items()
        if (found := reshaped(node, example(x), above, example(node))) is not None:
            return found, {}
    token = axis_below(node, {x: axes.token for x, axes in given.items()})
    batch, samples = None, {}
    if all(axes.batch is not None for axes in given.values()):
        batch = axis_below(node, {x: axes.batch for x, axes in given.items() if axes.batch is not None})
        samples = carried(node, batch)
    count = next((axes.samples for axes in given.values()), None)
    return Axes(token, batch, count), {
        x: Axes(a, samples.get(x), count) for x, a in carried(node, token).items() if x not in given
    }


def find(start: Node, axes: Axes, held: bool = False) -> Below:
    """Return the row-wise operations below `start`, whose rows but for a few are zero, or `held`."""
    below = Below(start, held, {start: axes}, {} if held else {start: ZERO})
    autocast = under_autocast(start.graph)
    node = start.next
    while node.op != "output":
        if not below.nodes.keys().isdisjoint(read_by_value(node)) and not reads_size(node):
            try:
                _add(below, node, autocast)
            except Mixes as reason:
                below.stops[node] = str(reason)
        node = node.next
    while cut := [node for node in below.results if not isinstance(example(node), torch.Tensor)]:
        _remove(below, cut[0])  # the tensors of a split cannot be put back all at once
    return below


def _remove(below: Below, node: Node) -> None:
    del below.nodes[node]
    below.values.pop(node, None)
    below.others.pop(node, None)
    for user in [user for user in node.users if user in below.nodes]:
        _remove(below, user)


def _add(below: Below, node: Node, autocast: set[Node]) -> None:
    axes, others = follow(node, below.nodes, autocast)
    if below.held:
        if others:
            raise Mixes(f"{spelled(node)!r} meets a tensor with tokens of its own")
        below.nodes[node] = axes
        return
    given = [x for x in read_by_value(node) if x in below.nodes]
    interval = row_values.below(node, {x: below.values[x] for x in given})
    if others:
        alike = all(same_shape(example(x).shape, example(node).shape) for x in (*given, *others))
        known = {x: a for given in below.others.values() for x, a in given.items()}
        if (
            not is_op(node, "mul")
            or interval != ZERO
            or not alike
            or any(known.get(x, a) != a for x, a in others.items())
        ):
            raise Mixes(f"{spelled(node)!r} meets a tensor with tokens of its own")
        below.others[node] = others
    below.nodes[node], below.values[node] = axes, interval
