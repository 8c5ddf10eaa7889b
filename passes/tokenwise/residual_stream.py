"""Where a layer ends: the residual stream after everything that it adds to its own input.

    x ──┬────────────────────── + ──┬──────────────── + ──> y          x passes the layer, a and m are what it adds
        └─ norm, attention ─> a ┘   └─ norm, MLP ─> m ┘

A token passes the layer unchanged if nothing is added to it. `find` goes down from the attention, through operations
that treat every token by itself, to the lowest tensor that everything from the attention comes through, and that is a
sum with one term that all its other terms are computed from: that term is x. So it does not matter where the norms
stand, whether attention and MLP follow each other or run side by side, whether what is added is gated or scaled, or
whether the MLP is one of many experts. What a layer adds besides, such as a tensor of the vision tower's, is not
computed from x; the layer ends before it.

    y = (x + a) * scale     a token that passes gets x * scale
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.graph import propagate
from zipvl_compile.passes.graph.op_kinds import Tokens, Values
from zipvl_compile.passes.graph.reading import arguments, example, holds_tensors, is_op, of, same_shape, spelled
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import reads_size
from zipvl_compile.passes.tokenwise.forward_slice import follow, summands
from zipvl_compile.passes.tokenwise.sole_readers import under_autocast

END = "the hidden state leaves the graph"
NO_RESIDUAL = "what the attention gives is not added to a tensor that it is computed from"


@dataclass(frozen=True)
class LayerEnd:
    """The output of a layer.

    Attributes:
        output: the residual stream after the layer.
        axes: of it.
        entry: the residual stream before it; `output` of a token that nothing is added to is computed from it.
        scaling: the operations between that `entry` meets all the same, from top to bottom.
        stop: why the layer goes no lower.
    """

    output: Node
    axes: Axes
    entry: Node
    scaling: tuple[Node, ...] = ()
    stop: str = ""

    def passed(self, before: Node) -> Node:
        """Insert, before a node, the `output` of tokens that nothing is added to."""
        value = self.entry
        for node in self.scaling:
            source = _scaled(node)
            with before.graph.inserting_before(before):
                new = before.graph.node_copy(node, lambda x, source=source, value=value: value if x is source else x)  # type: ignore[misc]
            propagate(new)
            value = new
        return value


@dataclass
class _Region:
    """Operations below an attention that treat every token by itself.

    Attributes:
        nodes: the attention and the operations, with their axes.
        others: by operation, what it reads besides that has tokens.
        joints: those that everything from the attention comes through.
        stop: why it goes no lower.
    """

    nodes: dict[Node, Axes]
    others: dict[Node, list[Node]] = field(default_factory=dict)
    joints: list[Node] = field(default_factory=list)
    stop: str = ""


def find(attention: Node, axes: Axes) -> LayerEnd:
    """Return where the layer of an attention ends.

    Args:
        attention: its output `[B, H, n, D]`.
        axes: of that.

    Raises:
        Mixes: it is not known where; the message says why.
    """
    region, reason = _below(attention, axes), ""
    for node in reversed(region.joints):
        try:
            entry, scaling = _passes(node, region.nodes)
            _check_others(node, _unscaled(entry), region)
            return LayerEnd(node, region.nodes[node], entry, tuple(scaling), region.stop)
        except Mixes as why:
            reason = reason or str(why)
    raise Mixes(region.stop if region.stop != END else reason or NO_RESIDUAL)


def _below(attention: Node, axes: Axes) -> _Region:
    """Follow an attention down until a row depends on other tokens, or leaves the graph."""
    region, autocast = _Region({attention: axes}), under_autocast(attention.graph)
    pending = _readers(attention)
    for node in _after(attention):
        if node not in pending:
            continue
        pending.discard(node)
        try:
            if node.op == "output":
                raise Mixes(END)
            region.nodes[node], others = follow(node, region.nodes, autocast)
        except Mixes as reason:
            region.stop = str(reason)
            return region
        region.others[node] = list(others)
        if not pending and isinstance(example(node), torch.Tensor):
            region.joints.append(node)
        pending |= _readers(node)
    return region


def _after(node: Node) -> Iterable[Node]:
    """Yield what follows a node in its graph."""
    while node.op != "output":
        node = node.next
        yield node


def _readers(node: Node) -> set[Node]:
    return {user for user in node.users if not reads_size(user)}


def _passes(node: Node, region: dict[Node, Axes]) -> tuple[Node, list[Node]]:
    """Return what is left of a tensor where the layer adds nothing: a tensor, and operations on it.

    Raises:
        Mixes: it is no sum with a term that all the others are computed from.
    """
    if (source := _scaled(node)) is not None:
        entry, scaling = _passes(source, region)
        return entry, [*scaling, node]
    terms = _terms(node, region)
    for term in terms:
        others = [x for x in terms if x is not term]
        if len(others) != len(terms) - 1 or not others:
            continue
        # A term that something else reads is no branch of this layer, but passes it, too.
        branches = all(x in region or len(x.users) == 1 for x in others)
        if branches and all(_comes_from(x, _unscaled(term)) for x in others):
            return _passes(term, region) if term in region else (term, [])
    raise Mixes(NO_RESIDUAL)


def _check_others(end: Node, entry: Node, region: _Region) -> None:
    """Refuse a layer that ends below where it meets tokens that do not come from its own `entry`.

    What a model computes once for all layers reaches every token, those that pass the layer, too.
    """
    for node, others in region.others.items():
        if node <= end and not all(_comes_from(x, entry) for x in others):
            raise Mixes(f"{spelled(node)!r} meets a tensor with tokens that do not come from the layer's input")


def _terms(node: Node, region: dict[Node, Axes]) -> list[Node]:
    """Return the tensors that a node is the sum of, as far as it is this layer's sum."""
    found = summands(node) if node in region or len(node.users) == 1 else []
    return [term for x in found for term in _terms(x, region)] or [node]


def _scaled(node: Node) -> Node | None:
    """Return the tensor that a node gives another scale or dtype, the same for every token, or None."""
    op = of(node)
    if op is not None and (op.tokens, op.values) == (Tokens.FIRST, Values.KEPT):  # a cast
        return arguments(node)["input"]
    if not is_op(node, "mul", "div"):
        return None
    tensors = [x for x in node.all_input_nodes if holds_tensors(x)]
    whole = [x for x in tensors if same_shape(example(x).shape, example(node).shape)]
    if len(whole) != 1 or (is_op(node, "div") and arguments(node)["input"] is not whole[0]):
        return None
    alike = all(x in whole or example(x).dim() <= 1 or example(x).numel() == 1 for x in tensors)
    return whole[0] if alike else None


def _unscaled(node: Node) -> Node:
    while (source := _scaled(node)) is not None:
        node = source
    return node


def _comes_from(x: Node, source: Node) -> bool:
    """Return whether a tensor is computed from another one."""
    seen, todo = set(), [x]
    while todo:
        node = todo.pop()
        if node is source:
            return True
        if node not in seen and source < node:
            seen.add(node)
            todo += node.all_input_nodes
    return False
