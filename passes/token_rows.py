"""Tensors that are computed token by token from a cached one, and the same for other tokens.

Latent attention (MLA) caches a small latent of each token and expands it to keys and values in every step:

    latent = kv_view(buffer, positions, prompt, n)          [B, 1, n, R]
    k, v   = split(linear(latent).view(B, n, H, D).transpose(1, 2))

Every row of k and v depends on the same row of the latent alone, so that the kept rows of k and v are those of the kept
latents. `TokenRows` proves it, operation by operation, by following the token axis, and `again` computes k and v for
rows of another number. An operation that it does not know might mix tokens: `Mixes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from zipvl_compile.passes.attention_site import AttentionSite, changed_in_place, writes
from zipvl_compile.passes.graph_edit import args_of, arguments, example, op_name, propagate

_FRESH = ("new_empty", "new_zeros", "new_ones")
_SIZED = ("view", "reshape", "expand", *_FRESH)


class Mixes(Exception):
    """Rows of the tensor are not known to depend on one token each; the message names the operation."""


class TokenRows:
    """The token axis of every node that is computed from `sources`, all `[B, H, n, D]`."""

    def __init__(self, sources: Iterable[Node]) -> None:
        self.sources = tuple(sources)
        self._axis: dict[Node, int | None] = dict.fromkeys(self.sources, 2)
        self.reached = set(self.sources)
        for node in self.sources[0].graph.nodes:
            if not self.reached.isdisjoint(node.all_input_nodes):
                self.reached.add(node)
                if op_name(node) == "copy_":
                    self.reached |= {args_of(node)[0], *args_of(node)[0].all_input_nodes}

    def axis(self, node: Any) -> int | None:
        """Return the token axis of `node`; None where it is not computed from the sources.

        Raises:
            Mixes: its rows may depend on several tokens.
        """
        if not isinstance(node, Node) or node not in self.reached:
            return None
        if node not in self._axis and not _holds_tensors(node):
            return None  # a size
        if node not in self._axis:
            rule = _RULES.get(op_name(node))
            if rule is None or node.op == "placeholder":
                raise Mixes(f"{op_name(node)!r} may mix tokens")
            _check_writes(node)
            self._axis[node] = rule(self, node)
        return self._axis[node]

    def differs(self, nodes: Iterable[Node]) -> str:
        """Return why rows of `nodes [B, H, n, D]` may not stand for rows of the sources, or an empty string."""
        try:
            axes = {self.axis(node) for node in nodes}
        except Mixes as reason:
            return str(reason)
        return "" if axes == {2} else "the tokens are not on the third axis"

    def again(self, targets: Iterable[Node], rows: dict[Node, Node], count: Any, before: Node) -> list[Node]:
        """Compute `targets` again, before a node, from `rows [B, H, count, D]` in the place of the sources."""
        graph, new, targets = before.graph, dict(rows), list(targets)
        needed = self._needed(targets)
        for node in [node for node in graph.nodes if node in needed]:
            with graph.inserting_before(before):
                new[node] = graph.node_copy(node, lambda x: new.get(x, x))
            self._resize(node, new[node], count)
            propagate(new[node])
        return [new[target] for target in targets]

    def erase(self, targets: Iterable[Node]) -> None:
        """Erase `targets` and what leads to them from the sources, if nothing else reads any of it."""
        needed = self._needed(list(targets))
        if all(user in needed for node in needed for user in node.users):
            for node in [node for node in reversed(self.sources[0].graph.nodes) if node in needed]:
                node.graph.erase_node(node)

    def _needed(self, targets: list[Node]) -> set[Node]:
        needed: set[Node] = set()
        todo = list(targets)
        while todo:
            node = todo.pop()
            if node in needed or node in self.sources or node not in self.reached:
                continue
            needed.add(node)  # the sizes of tensors, too: those of the new ones are other numbers
            todo += node.all_input_nodes
            if op_name(node) in _FRESH:
                todo += [x for view in node.users for write in _writes_to(view) for x in (view, write)]
        return needed

    def _resize(self, node: Node, copy: Node, count: Any) -> None:
        """Put `count` in the place of the number of tokens among the sizes that a call names."""
        if op_name(node) not in _SIZED:
            return
        first, *sizes = args_of(copy)
        nested = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
        sizes = list(sizes[0]) if nested else sizes
        axis = self.axis(node)
        assert axis is not None
        if sizes[axis] != -1:
            sizes[axis] = count
        copy.args = (first, tuple(sizes)) if nested else (first, *sizes)


def first_computed_from(sources: list[Node], sites: list[AttentionSite]) -> AttentionSite | None:
    """Return the first attention that the sources flow into, if its keys and values are computed from them by token."""
    rows = TokenRows(sources)
    site = next((s for s in sites if not rows.reached.isdisjoint({s.query, s.key, s.value})), None)
    if site is None or rows.differs((site.key, site.value)):
        return None
    return site


def _holds_tensors(node: Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(example(node)))


def _check_writes(node: Node) -> None:
    """Refuse tensors that are written to, but for empty ones that are filled by copies into parts of them."""
    above = [x for x in args_of(node)[:1] if isinstance(x, Node)]
    filled = [x for x in (node, *above) if op_name(x) in _FRESH]
    parts = [user for base in filled for user in base.users]
    others = [part for part in parts if changed_in_place(part) and not _writes_to(part)]
    direct = any(writes(user) for base in filled for user in base.users)
    if others or direct or (not filled and op_name(node) != "copy_" and changed_in_place(node)):
        raise Mixes(f"the result of {op_name(node)!r} is changed in place")


def _writes_to(view: Node) -> list[Node]:
    return [user for user in view.users if op_name(user) == "copy_" and args_of(user)[0] is view]


def _pointwise(rows: TokenRows, node: Node) -> int:
    """The token axis of all operands is the same, counted from the right, as broadcasting aligns them."""
    tensors = [x for x in tree_leaves(node.args) if isinstance(example(x), torch.Tensor)]
    axes = {example(x).dim() - a for x in tensors if (a := rows.axis(x)) is not None}
    if len(axes) != 1:
        raise Mixes(f"{op_name(node)!r} meets tokens on different axes")
    (back,) = axes
    for x in tensors:
        value = example(x)
        if rows.axis(x) is None and value.dim() >= back and not statically_known_true(value.shape[-back] == 1):
            raise Mixes(f"{op_name(node)!r} meets a tensor with tokens of its own")
    return example(node).dim() - back


def _by_features(rows: TokenRows, node: Node) -> int:
    axis = _axis_of_input(rows, node)
    if axis == example(args_of(node)[0]).dim() - 1:
        raise Mixes(f"{op_name(node)!r} works along the tokens")
    return axis


def _axis_of_input(rows: TokenRows, node: Node) -> int:
    axis = rows.axis(args_of(node)[0])
    if axis is None:
        raise Mixes(f"{op_name(node)!r} reads the tokens in another argument than its first")
    return axis


def _transpose(rows: TokenRows, node: Node) -> int:
    given, axis = arguments(node, "input", "dim0", "dim1"), _axis_of_input(rows, node)
    rank = example(node).dim()
    a, b = given["dim0"] % rank, given["dim1"] % rank
    return {a: b, b: a}.get(axis, axis)


def _reshape(rows: TokenRows, node: Node) -> int:
    """The token axis stays whole, with equally many elements before it."""
    axis = _axis_of_input(rows, node)
    old, new = example(args_of(node)[0]).shape, example(node).shape
    for place in range(len(new)):
        same = statically_known_true(new[place] == old[axis])
        if same and statically_known_true(_product(new[:place]) == _product(old[:axis])):
            return place
    raise Mixes(f"{op_name(node)!r} takes the token axis apart")


def _product(sizes: Any) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _expand(rows: TokenRows, node: Node) -> int:
    return _axis_of_input(rows, node) + example(node).dim() - example(args_of(node)[0]).dim()


def _split(rows: TokenRows, node: Node) -> int:
    axis, dim = _axis_of_input(rows, node), arguments(node, "input", "sizes", "dim").get("dim", 0)
    if dim % example(args_of(node)[0]).dim() == axis:
        raise Mixes(f"{op_name(node)!r} cuts the token axis")
    return axis


def _getitem(rows: TokenRows, node: Node) -> int:
    source, index = args_of(node)
    axis = _axis_of_input(rows, node)
    if isinstance(index, int) and not isinstance(example(source), torch.Tensor):
        return axis  # one of the tensors of a split
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index):
        raise Mixes("an index that is a tensor may mix tokens")
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    rest = [slice(None)] * (example(source).dim() - used)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    old, new = -1, -1
    for item in (*index[:at], *rest, *index[at + 1 :]):
        old += item is not None
        new += item is None or isinstance(item, slice)
        if old == axis and item is not None:
            if item != slice(None):
                raise Mixes("the token axis is indexed")
            return new
    raise Mixes("the token axis is lost")


def _cat(rows: TokenRows, node: Node) -> int:
    tensors = arguments(node, "tensors", "dim")["tensors"]
    axes = {rows.axis(x) for x in tensors}
    dim = arguments(node, "tensors", "dim").get("dim", 0) % example(node).dim()
    axis = axes.pop()
    if axes or axis is None or axis == dim:
        raise Mixes("'cat' joins tokens with others")
    return axis


def _fresh(rows: TokenRows, node: Node) -> int:
    """The token axis of an empty tensor is that of what is copied into it."""
    axes = {rows.axis(args_of(write)[1]) for view in node.users for write in _writes_to(view)}
    if len(axes) != 1 or (axis := axes.pop()) is None:
        raise Mixes(f"{op_name(node)!r} is filled in an unknown way")
    return axis


def _copy(rows: TokenRows, node: Node) -> int:
    axis = rows.axis(args_of(node)[0])
    if axis is None or axis != rows.axis(args_of(node)[1]):
        raise Mixes("'copy_' meets tokens on different axes")
    return axis


_RULES: dict[str, Callable[[TokenRows, Node], int]] = {
    **dict.fromkeys(("to", "float", "type_as", "contiguous", "clone"), _pointwise),
    **dict.fromkeys(("neg", "add", "sub", "mul", "truediv"), _pointwise),
    "linear": _by_features, "transpose": _transpose, "view": _reshape, "reshape": _reshape, "expand": _expand,
    "split": _split, "chunk": _split, "getitem": _getitem, "cat": _cat, "copy_": _copy,
    **dict.fromkeys(_FRESH, _fresh),
}  # fmt: skip
