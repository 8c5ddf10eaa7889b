"""Calls that change a tensor of their own in place, as calls that return another.

    top, ids = topk(probabilities, K)                top, ids = topk(probabilities, K)
    top /= top.sum(-1, keepdim=True)                 new = top / top.sum(-1, keepdim=True)
    read(top)                                        read(new)

Only where nobody can tell: the tensor is a new one that no other shares memory with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.graph import insert_call, replace
from zipvl_compile.passes.graph.op_kinds import Tokens
from zipvl_compile.passes.graph.reading import arguments, example, holds_tensors, is_op, of, same_shape, shared, written


def rewrite(nodes: Iterable[Node]) -> None:
    """Replace those of `nodes`, in their order, that may be replaced."""
    for node in nodes:
        other = _other(node)
        if other is None or not is_own(node):
            continue
        new = insert_call(node, other, node.args, node.kwargs)
        old, value = example(node), example(new)
        if value.dtype == old.dtype and same_shape(value.shape, old.shape):
            (target,) = written(node)
            for user in [user for user in target.users if user > node]:
                user.replace_input_with(target, new)
            replace(node, new)
            node.graph.erase_node(node)
        else:
            node.graph.erase_node(new)


def _other(node: Node) -> Callable[..., Any] | None:
    """Return the function that a call in place is the in-place form of, where it has one by the same arguments."""
    op = of(node)
    if op is None or not op.name.endswith("_") or op.tokens is Tokens.COPY:
        return None
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if node.op == "call_function" and getattr(operator, name, None) is node.target:
        return getattr(operator, name[1:], None) if name.startswith("i") else None
    return getattr(torch, name[:-1], None) if name.endswith("_") else None


def is_own(node: Node) -> bool:
    """Return whether nobody reads what it writes through another tensor."""
    targets = written(node)
    if len(targets) != 1 or targets[0] is not arguments(node).get("input") or not _is_new(targets[0]):
        return False
    before = [user for user in targets[0].users if user < node]
    return not any(holds_tensors(user) and targets[0] in shared(user) for user in before)


def _is_new(node: Node) -> bool:
    """Return whether a tensor has memory of its own, or that of one that nobody reads otherwise, as `x.to(x.dtype)`."""
    if is_op(node, "getitem") and not isinstance(example(node.args[0]), torch.Tensor):
        source = node.args[0]
        return isinstance(source, Node) and node.op == "call_function" and not shared(source) and of(source) is not None
    return of(node) is not None and all(_only_for(node, source) and _is_new(source) for source in shared(node))


def _only_for(node: Node, source: Node) -> bool:
    """Return whether a tensor is read as all of another alone."""
    return [*source.users] == [node] and same_shape(example(source).shape, example(node).shape)
