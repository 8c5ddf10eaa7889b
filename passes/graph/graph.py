"""Small, safe edits of the torch-level graph that Dynamo hands to a backend.

The graph is not functional: it holds in-place calls whose results nobody reads. So nothing here, and nothing in any
pass, removes "dead" code in general; a rewrite erases only the nodes that it orphaned itself.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from zipvl_compile.kernels import ops as _ops  # noqa: F401  (registers the operators)

ops = torch.ops.zipvl


def example(node: Any) -> Any:
    """Return the fake value that Dynamo recorded for `node` (constants stand for themselves)."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def propagate(node: Node) -> None:
    """Set `node`'s fake value, and the unbacked symbols it introduces, from those of its arguments."""
    args, kwargs = map_arg(node.args, example), map_arg(node.kwargs, example)
    # Not detect_fake_mode: while a backend runs, it returns a mode other than that of the recorded values.
    fakes = tree_leaves([example(a) for a in node.all_input_nodes])
    fake_mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    numbers = all(isinstance(fake, (int, float, torch.SymInt, torch.SymFloat)) for fake in fakes)
    if fake_mode is None and not numbers:  # a graph without fake values, such as one written by hand in a test
        return
    call = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    # With the Python dispatcher, as Dynamo does: C++ decompositions of some releases ask symbolic sizes for numbers.
    with fake_mode or contextlib.nullcontext(), enable_python_dispatcher():
        value = call(*(args[1:] if node.op == "call_method" else args), **kwargs)  # type: ignore[operator, index]
    node.meta["example_value"] = value
    bindings = compute_unbacked_bindings(fake_mode.shape_env, value) if fake_mode is not None else None
    if bindings:
        node.meta["unbacked_bindings"] = bindings


def insert_call(
    before: Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Node:
    """Insert `target(*args, **kwargs)` before a node, with its fake value and the source information of that node."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    propagate(node)
    return node


def is_call(node: Any, target: Callable[..., Any]) -> bool:
    """Return whether `node` calls `target`; an operator counts with and without its overload name."""
    if not (isinstance(node, Node) and node.op == "call_function"):
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet is getattr(target, "overloadpacket", target)


def calls(graph: Graph, target: Callable[..., Any]) -> list[Node]:
    """Return the nodes that call `target`, in order."""
    return [node for node in graph.nodes if is_call(node, target)]


def op_name(node: Node) -> str:
    """Return what a node does, whichever way it was called: `x & y`, `x.__and__(y)` and `operator.and_` are "and".

    In-place calls keep their own names: "masked_fill_", "iadd", "setitem".
    """
    if node.op == "call_method":
        name = str(node.target)
    else:
        target = getattr(node.target, "overloadpacket", node.target)
        name = getattr(target, "__name__", str(target))
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    return {"and_": "and", "or_": "or", "not_": "not"}.get(name, name)


def args_of(node: Node) -> tuple[Any, ...]:
    """Return the positional arguments of a call."""
    return node.args


def arguments(node: Node, *names: str) -> dict[str, Any]:
    """Return the arguments of a call by name, `names` in the order of its positional ones."""
    return dict(zip(names, args_of(node), strict=False)) | dict(node.kwargs)


_PURE_FUNCTIONS = (
    operator.getitem, torch.repeat_interleave, ops.token_positions, ops.gather_tokens, ops.kv_view,
)  # fmt: skip
_PURE_METHODS = ("expand", "reshape", "view", "unsqueeze", "repeat_interleave", "size")


def erase_unread(nodes: Iterable[Node]) -> None:
    """Erase those of `nodes`, all known to be pure and given readers first, that nobody reads any more."""
    for node in nodes:
        if not node._erased and not node.users:
            node.graph.erase_node(node)


def erase_orphans(nodes: Iterable[Any]) -> None:
    """Erase the given nodes, and what only they used, as far as nobody reads them.

    Call it with nodes whose only readers a rewrite removed. It goes up through the few calls that rewrites orphan, all
    known to be pure, and ends at anything else.
    """
    todo = [node for node in nodes if isinstance(node, Node)]
    while todo:
        node = todo.pop()
        if node._erased or node.users or not _is_pure(node):
            continue
        inputs = list(node.all_input_nodes)
        node.graph.erase_node(node)
        todo.extend(inputs)


def _is_pure(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    return "out" not in node.kwargs and any(is_call(node, target) for target in _PURE_FUNCTIONS)
