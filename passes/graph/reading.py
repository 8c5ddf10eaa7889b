"""What a node calls, its arguments by name, and what it reads and writes, by the table of operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.op_kinds import Op
from zipvl_compile.passes.graph.op_traits import NAMES, SYNONYMS, of_target
from zipvl_compile.passes.graph.private import FakeTensor, OpOverload, leaves


def example(node: Any) -> Any:
    """Return the fake value that Dynamo recorded for `node` (constants stand for themselves)."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def same_shape(left: Any, right: Any) -> bool:
    """Return whether two shapes are known to be equal."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def holds_tensors(node: Any) -> bool:
    """Return whether a node is a tensor or has some, not a size."""
    return isinstance(node, Node) and any(isinstance(leaf, torch.Tensor) for leaf in leaves(example(node)))


def holds_subclass(node: Node) -> bool:
    """Return whether a call is given a tensor subclass, such as a quantised weight, that computes as it likes."""
    tensors = [leaf for x in node.all_input_nodes for leaf in leaves(example(x)) if isinstance(leaf, torch.Tensor)]
    return any(type(x) not in (torch.Tensor, torch.nn.Parameter, FakeTensor) for x in tensors)


def of(node: Any) -> Op | None:
    """Return what a node does; None where it is no call, or one of an operation that nobody knows."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.op == "call_method":
        # A graph written by hand may have recorded nothing.
        owner = node.args[0] if node.args else None
        known = isinstance(owner, Node) and "example_value" in owner.meta
        return of_target(node.target) if holds_tensors(owner) or not known else None
    return of_target(node.target)


def is_op(node: Any, *names: str) -> bool:
    """Return whether a node calls one of these operations of the table, and nothing that only has its name."""
    assert NAMES.issuperset(names), f"not in the table: {set(names) - NAMES}"
    op = of(node)
    return op is not None and op.name in names


def spelled(node: Node) -> str:
    """Return what a node calls, as a person would write it, for messages only."""
    if node.op == "call_method":
        name = str(node.target)
    else:
        target = getattr(node.target, "overloadpacket", node.target)
        name = getattr(target, "__name__", str(target))
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a known call by the names of the table, however they were passed.

    Raises:
        TypeError: more arguments than the operation is known to take.
    """
    op = of(node)
    if op is None:
        raise TypeError(f"{spelled(node)!r} is not an operation that is known")
    names = op.signatures.get(node.target, op.arguments)
    if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
        names = tuple(SYNONYMS.get(a.name, a.name) for a in node.target._schema.arguments)
    given: dict[str, Any] = {}
    for place, value in enumerate(node.args):
        name = names[place] if place < len(names) else ""
        if name.startswith("*"):
            rest = node.args[place:]
            given[name[1:]] = tuple(value) if len(rest) == 1 and isinstance(value, (tuple, list)) else tuple(rest)
            break
        if not name:
            raise TypeError(f"{spelled(node)!r} has {len(node.args)} arguments, expected at most {len(names)}")
        given[name] = value
    return given | {SYNONYMS.get(name, name): value for name, value in node.kwargs.items()}


def read_by_value(node: Node) -> list[Node]:
    """Return the inputs of a node that are read for more than their dtype."""
    op, inputs = of(node), list(node.all_input_nodes)
    if op is None or not op.typed:
        return inputs
    values = [x for name, value in arguments(node).items() if name not in op.typed for x in leaves(value)]
    return [x for x in inputs if x in values]


def written(node: Node) -> list[Node]:
    """Return the tensors that a node may write to; of an operation that nobody knows, everything that it was given."""
    if node.op not in ("call_function", "call_method"):
        return []
    op = of(node)
    if op is None:
        return [x for x in node.all_input_nodes if holds_tensors(x)]
    outs = [name for name in op.outs if name in node.kwargs]
    if not op.writes and not outs and "inplace" not in op.arguments:
        return []
    given = arguments(node)
    inplace = [op.arguments[0]] if given.get("inplace") else []
    found = [given.get(name) for name in (*op.writes, *outs, *inplace)]
    return [leaf for value in found for leaf in leaves(value) if isinstance(leaf, Node)]


def shared(node: Node) -> list[Node]:
    """Return the inputs whose memory a result of the node may share."""
    if node.op not in ("call_function", "call_method"):
        return []
    op = of(node)
    if op is not None and not op.view:
        return written(node)
    return [x for x in node.all_input_nodes if holds_tensors(x)] if holds_tensors(node) else []


def is_pure(node: Node) -> bool:
    """Return whether a node does nothing but compute its result, so that it may go where nobody reads that."""
    op = of(node)
    return op is not None and not op.effect and not written(node)


def memory_of(node: Node) -> set[Node]:
    """Return the nodes whose memory may be that of `node`: what it is a view of, and every view of that."""
    memory: set[Node] = set()
    todo = [node]
    while todo:
        x = todo.pop()
        if x not in memory:
            memory.add(x)
            todo += shared(x)
            todo += [user for user in x.users if x in shared(user)]
    return memory


def changed_in_place(node: Node) -> bool:
    """Return whether the graph may write to the tensor of `node` after it was computed, directly or through a view.

    Views of the same memory count wherever they come from: `node` may be one itself.
    """
    return any(x in written(user) and user > node for x in memory_of(node) for user in x.users)


def product(sizes: Iterable[Any]) -> Any:
    """Return the product of sizes: a number, or a symbol."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result
