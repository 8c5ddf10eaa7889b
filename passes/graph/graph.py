"""Small, safe edits of the torch-level graph that Dynamo hands to a backend.

The graph is not functional: it holds in-place calls whose results nobody reads. So nothing here, and nothing in any
pass, removes "dead" code in general; a rewrite erases only the nodes that it orphaned itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import SymFloat, SymInt
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.fx.node import map_arg

from zipvl_compile.passes.graph.private import copy_source, fake_mode_of, faking, leaves
from zipvl_compile.passes.graph.reading import example, is_pure


def propagate(node: Node, mode: Any = None) -> None:
    """Set `node`'s fake value, and the unbacked symbols it introduces, from those of its arguments.

    A call without a tensor, such as `arange`, makes one in the given mode.
    """
    args, kwargs = map_arg(node.args, example), map_arg(node.kwargs, example)
    fakes = [leaf for x in node.all_input_nodes for leaf in leaves(example(x))]
    mode = fake_mode_of(fakes) or mode
    numbers = all(isinstance(fake, (int, float, SymInt, SymFloat)) for fake in fakes)
    if mode is None and not numbers:  # a graph without fake values, such as one written by hand in a test
        return
    call = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    with faking(mode):
        value = call(*(args[1:] if node.op == "call_method" else args), **kwargs)  # type: ignore[operator, index]
    node.meta["example_value"] = value
    bindings = compute_unbacked_bindings(mode.shape_env, value) if mode is not None else None
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


def size(x: Node, axis: int, before: Node) -> Any:
    """Return a size of `x`: a number, or a node inserted before another where only the running graph knows it."""
    known = example(x).shape[axis]
    return known if isinstance(known, int) else insert_call(before, torch.ops.aten.sym_size.int, (x, axis))


def is_call(node: Any, target: Callable[..., Any]) -> bool:
    """Return whether `node` calls `target`; an operator counts with and without its overload name."""
    if not (isinstance(node, Node) and node.op == "call_function"):
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet is getattr(target, "overloadpacket", target)


def calls(graph: Graph, target: Callable[..., Any]) -> list[Node]:
    """Return the nodes that call `target`, in order."""
    return [node for node in graph.nodes if is_call(node, target)]


def replace(node: Node, new: Node) -> None:
    """Let everyone who reads `node` read `new`, which has the same value; `current` finds it from then on."""
    node.replace_all_uses_with(new)
    node.meta["replaced_by"] = new


def current(node: Node) -> Node:
    """Return what stands for `node` after all replacements."""
    while "replaced_by" in node.meta:
        node = node.meta["replaced_by"]
    return node


def erase_unread(nodes: Iterable[Node]) -> None:
    """Erase those of `nodes`, all known to be pure and given readers first, that nobody reads any more."""
    for node in nodes:
        if not node._erased and not node.users:
            node.graph.erase_node(node)


def erase_orphans(nodes: Iterable[Any]) -> None:
    """Erase the given nodes, and what only they used, as far as nobody reads them.

    Call it with nodes whose only readers a rewrite removed. It goes up through calls that do nothing but compute their
    result, and ends at anything else.
    """
    todo = [node for node in nodes if isinstance(node, Node)]
    while todo:
        node = todo.pop()
        if node._erased or node.users or not is_pure(node):
            continue
        inputs = list(node.all_input_nodes)
        node.graph.erase_node(node)
        todo.extend(inputs)


def copied(graph: Graph) -> Graph:
    """Return a copy of a graph, with what Dynamo knows of its inputs."""
    new, nodes = Graph(), dict[Node, Node]()
    new.graph_copy(graph, nodes)
    output = graph.output_node()
    nodes[output] = new.node_copy(output, lambda node: nodes[node])
    for node in graph.find_nodes(op="placeholder"):
        copy_source(node, nodes[node])
    return new


def insert_input(graph: Graph, name: str, value: Any) -> Node:
    """Add a last input to a graph, with its fake value, and return it; its caller has to give it."""
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    copy_source(None, node)
    return node


@contextlib.contextmanager
def undone_on_error(graph: Graph) -> Iterator[None]:
    """Erase what the block inserted if it raises, and let the error pass.

    A rewrite inserts first and replaces last, so that this undoes it. What others read already stays, and the runner
    of the passes puts the whole graph back.
    """
    before = set(graph.nodes)
    try:
        yield
    except Exception:
        for node in reversed([node for node in graph.nodes if node not in before]):
            if not node.users:
                graph.erase_node(node)
        raise
