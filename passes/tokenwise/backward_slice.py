"""Compute tensors again for some of their tokens only.

A tensor that is computed token by token has any of its rows for the price of those rows:

    v = linear(norm(h), w).view(B, n, H, D).transpose(1, 2)                     every token
    v[:, :, rows] = linear(norm(h)[:, rows], w).view(B, m, H, D).transpose(1, 2)

`find` follows the token axis from the wanted tensors upwards, operation by operation (`axis_rules.py`), to the tensors
whose rows have to be taken: those that mix tokens, and those that are there anyway since others read them. `again`
inserts the computation for other rows.

Latent attention (MLA) is the case where the sources are given: the cache keeps a small latent of each token, and keys
and values of the kept tokens are computed from it (`TokenRows`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import erase_unread, insert_call, propagate, size
from zipvl_compile.passes.graph.reading import (
    arguments,
    changed_in_place,
    example,
    holds_tensors,
    is_op,
    of,
    spelled,
    written,
)
from zipvl_compile.passes.tokenwise.axes import Axes, reshaped
from zipvl_compile.passes.tokenwise.axis_rules import FRESH, SIZED, Mixes, aligned
from zipvl_compile.passes.tokenwise.token_axis import axis_below, carried


@dataclass
class Cone:
    """Operations that compute `targets` token by token from `sources`; `stops` says why it goes no higher."""

    targets: dict[Node, Axes]
    nodes: dict[Node, Axes] = field(default_factory=dict)
    sources: dict[Node, Axes] = field(default_factory=dict)
    stops: dict[Node, str] = field(default_factory=dict)

    def again(self, rows: dict[Node, Node], count: Any, before: Node) -> dict[Node, Node]:
        """Compute the targets again, before a node, from `rows` of the sources, `count` tokens each."""
        return copy_for_rows(self.nodes, rows, count, before)

    def erase(self) -> None:
        """Erase what nobody reads any more."""
        erase_unread(sorted([*self.nodes, *sizes_of(self.nodes, self.sources)], reverse=True))


def find(graph: Graph, targets: dict[Node, Axes], is_source: Callable[[Node, Cone], bool]) -> Cone:
    """Return the largest cone above `targets` that ends at nodes where `is_source` holds or operations that mix tokens.

    Raises:
        Mixes: a tensor is read with tokens on different axes.
    """
    cone, wanted = Cone(targets), dict(targets)
    for node in sorted(_above(graph, targets), reverse=True):
        if is_op(node, "copy_") and (base := _filled(node)) in wanted:
            wanted[node] = wanted[_base_view(node)] = _through_view(_base_view(node), base, wanted[base])  # type: ignore
        if node not in wanted:
            continue
        axes = wanted[node]
        try:
            inputs = None if is_source(node, cone) else _inputs(node, axes)
        except Mixes as reason:
            inputs, cone.stops[node] = None, str(reason)
        if inputs is None:
            cone.sources[node] = axes
            continue
        cone.nodes[node] = axes
        for x, own in inputs.items():
            if wanted.setdefault(x, own) != own:
                raise Mixes(f"{spelled(x)!r} is read with tokens on different axes")
    for node in [node for node in cone.sources if not isinstance(example(node), torch.Tensor)]:
        del cone.sources[node]  # of the tensors of a split, rows are taken one by one
        for piece in [user for user in node.users if user in cone.nodes]:
            cone.sources[piece] = cone.nodes.pop(piece)
    return cone


def _above(graph: Graph, targets: Iterable[Node]) -> set[Node]:
    seen: set[Node] = set()
    todo = list(targets)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
            if is_op(node, *FRESH):
                todo += [write for view in node.users for write in _writes_to(view)]
    return seen


def _inputs(node: Node, axes: Axes) -> dict[Node, Axes]:
    """Return the inputs that have tokens, each with its axes; one without samples of its own ends the cone."""
    _check_writes(node)
    if (above := _across(node, axes)) is not None:
        return above
    tokens = carried(node, axes.token)
    if axes.batch is None:
        return {x: Axes(token) for x, token in tokens.items()}
    if axes.batch < 0 or statically_known_true(example_size(node, axes.batch) == 1):
        raise Mixes(f"{spelled(node)!r} is the same for every sample")
    samples = carried(node, axes.batch)
    own = {x: samples[x] if x in samples else aligned(x, node, axes.batch) for x in tokens}
    return {x: Axes(token, own[x], axes.samples) for x, token in tokens.items()}


def _across(node: Node, axes: Axes) -> dict[Node, Axes] | None:
    """Return the input of a call that joins or parts samples and tokens, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not holds_tensors(source):
        return None
    found = reshaped(node, example(node), axes, example(source))
    return None if found is None else {source: found}


def reads_size(user: Node) -> bool:
    """Return whether a reader of a tensor wants its size only."""
    op = of(user)
    named = is_op(user, "getattr") and user.args[1] in ("shape", "ndim", "dtype", "device")
    return op is not None and (op.sizes or named) and example(user) is not None and not holds_tensors(user)


def multiplies(node: Node) -> bool:
    """Return whether a node is a projection: a matrix product with a weight, or with those of some experts."""
    return is_op(node, "linear", "matmul", "mm", "addmm", "routed_experts")


def example_size(node: Node, axis: int) -> Any:
    """Return the size of an axis of a tensor, or of the tensors of a tuple."""
    value = example(node)
    return (value[0] if isinstance(value, (tuple, list)) else value).shape[axis]


def copy_for_rows(nodes: dict[Node, Axes], rows: dict[Node, Node], count: Any, before: Node) -> dict[Node, Node]:
    """Copy `nodes` before another, reading `rows` for what they replace, with `count` tokens on their token axes.

    Raises:
        Mixes: an operation does not take that many tokens, as tensor subclasses do with a number nobody knows yet.
    """
    new, sizes = dict(rows), sizes_of(nodes, rows)
    for node in sorted([*nodes, *sizes]):
        # A size stands for the new one where it names a size; a number that is computed with stays what it was.
        known = new if node in sizes or is_op(node, *SIZED) else {x: y for x, y in new.items() if x not in sizes}
        with before.graph.inserting_before(before):
            new[node] = before.graph.node_copy(node, lambda x, known=known: known.get(x, x))  # type: ignore[misc]
        if node in nodes:
            _resize(node, new[node], nodes[node], count)
        try:
            propagate(new[node])
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise Mixes(f"{spelled(node)!r} cannot be computed for some tokens ({why})") from error
    return new


def sizes_of(*tensors: Iterable[Node]) -> set[Node]:
    """Return the sizes of the given tensors, and sizes computed from them, that calls among the first of them name."""
    nodes, found = set(tensors[0]), set()
    todo = [user for given in tensors for node in given for user in node.users]
    while todo:
        node = todo.pop()
        if node not in found and node.op in ("call_function", "call_method") and not holds_tensors(node):
            found.add(node)
            todo += node.users
    read: set[Node] = set()
    for node in sorted({*nodes, *found}, reverse=True):
        if node in read or (node in nodes and is_op(node, *SIZED)):
            read |= found.intersection(node.all_input_nodes)
    return read


def _resize(node: Node, copy: Node, axes: Axes, count: Any) -> None:
    """Put `count` in the place of the number of tokens among the sizes that a call names."""
    if not is_op(node, *SIZED):
        return
    first, *sizes = copy.args
    nested = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
    sizes = list(sizes[0]) if nested else sizes  # type: ignore[arg-type]
    shape = example(node).shape
    # A -1 would have to be derived from `count`, which nobody may know before the graph runs.
    sizes = [shape[i] if size == -1 and isinstance(shape[i], int) else size for i, size in enumerate(sizes)]
    sizes[axes.token] = _of_all_samples(node, copy, axes, count) if axes.joined else count
    copy.args = (first, tuple(sizes)) if nested else (first, *sizes)


def _of_all_samples(node: Node, copy: Node, axes: Axes, count: Any) -> Any:
    """Return how many tokens all samples have together, where a call names it: a number, or a node before the copy."""
    source, first = node.args[0], copy.args[0]
    own = _inputs(node, axes).get(source) if isinstance(source, Node) else None
    if own is None or own.batch is None or not isinstance(first, Node):
        raise Mixes(f"{spelled(node)!r} names how many tokens all samples have")
    if own.joined:
        return size(first, own.token, copy)
    return insert_call(copy, operator.mul, (size(first, own.batch, copy), count))


class TokenRows:
    """Tensors that are computed from `sources`, all `[B, H, n, D]`, and from nothing else that has tokens."""

    def __init__(self, sources: Iterable[Node]) -> None:
        self.sources = tuple(sources)
        self.graph = self.sources[0].graph
        self.reached = set(self.sources)
        for node in self.graph.nodes:
            if not self.reached.isdisjoint(node.all_input_nodes):
                self.reached.add(node)
                if is_op(node, "copy_"):
                    self.reached |= {node.args[0], *node.args[0].all_input_nodes}

    def cone(self, targets: Iterable[Node]) -> Cone:
        """Return the computation of `targets [B, H, n, D]` from the sources.

        Raises:
            Mixes: rows of the targets may not stand for rows of the sources.
        """
        cone = find(self.graph, dict.fromkeys(targets, Axes(2)), self._ends)
        for node, axes in cone.sources.items():
            if node in self.sources and axes.token == 2:
                continue
            if node in self.sources:
                raise Mixes("the tokens are not on the third axis")
            if node in self.reached and node in cone.stops:
                raise Mixes(cone.stops[node])
            reader = next((spelled(user) for user in node.users if user in cone.nodes), "the attention")
            raise Mixes(f"{reader!r} meets a tensor with tokens of its own")
        if not cone.sources:
            raise Mixes("the tokens are not on the third axis")
        return cone

    def _ends(self, node: Node, cone: Cone) -> bool:
        return node in self.sources or node not in self.reached

    def differs(self, nodes: Iterable[Node]) -> str:
        """Return why rows of `nodes [B, H, n, D]` may not stand for rows of the sources, or an empty string."""
        try:
            self.cone(nodes)
        except Mixes as reason:
            return str(reason)
        return ""


def _check_writes(node: Node) -> None:
    """Refuse tensors that are written to, but for empty ones that are filled by copies into parts of them."""
    above = [x for x in node.args[:1] if isinstance(x, Node)]
    filled = [x for x in (node, *above) if is_op(x, *FRESH)]
    parts = [user for base in filled for user in base.users]
    others = [part for part in parts if changed_in_place(part) and not _writes_to(part)]
    direct = any(base in written(user) for base in filled for user in base.users)
    inputs = [x for x in node.all_input_nodes if holds_tensors(x) and not is_op(x, *FRESH)]
    if is_op(node, "copy_"):
        inputs.remove(arguments(node)["input"])
    changed = [x for x in (node, *inputs) if x not in filled and not is_op(x, "copy_") and changed_in_place(x)]
    if others or direct or (changed and not filled):
        raise Mixes(f"the result of {spelled((changed or [node])[0])!r} is changed in place")


def _writes_to(view: Node) -> list[Node]:
    return [user for user in view.users if is_op(user, "copy_") and user.args[0] is view]


def _base_view(copy: Node) -> Node:
    return arguments(copy)["input"]


def _filled(copy: Node) -> Node | None:
    """Return the empty tensor that a copy fills a part of."""
    above = _base_view(copy).args[:1]
    return above[0] if above and isinstance(above[0], Node) and is_op(above[0], *FRESH) else None


def _through_view(view: Node, base: Node, axes: Axes) -> Axes:
    batch = axes.batch
    return Axes(
        axis_below(view, {base: axes.token}), None if batch is None or batch < 0 else axis_below(view, {base: batch})
    )
