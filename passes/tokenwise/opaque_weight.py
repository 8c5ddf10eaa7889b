"""What a linear computes whose weight is a tensor subclass: traced to PyTorch's own operations.

    linear(x, Int8Tensor)   ->   mul(mm(view(x, [-1, K]), to(qdata.t())), scale), ...

The trace is taken with fake tensors, as Dynamo takes its own, and kept with the node. What cannot be traced is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from zipvl_compile.passes.graph.private import fake_mode_of, faking
from zipvl_compile.passes.graph.reading import arguments, example, holds_tensors, is_op, spelled
from zipvl_compile.passes.tokenwise.axis_rules import Mixes

State = TypeVar("State")
STAND_INS = (11, 13, 17, 19)  # numbers of rows: unlike each other, and none of them 1, which would broadcast


def walk(linear: Node, state: State, step: Callable[[Node, dict[Node, State]], State]) -> State:
    """Follow the input of a linear through what its weight computes.

    Args:
        state: of the input.
        step: returns that of an operation, given those of its inputs that come from the input.

    Returns:
        The state of the result.

    Raises:
        Mixes: the weight cannot be traced, or a step refuses; the message names the weight's type.
    """
    graph = _traced(linear)
    start = next(iter(graph.nodes))
    states, result = {start: state}, graph.output_node().args[0]
    try:
        for node in graph.nodes:
            given = {x: states[x] for x in node.all_input_nodes if x in states}
            if given and node.op != "output" and holds_tensors(node):
                states[node] = step(node, given)
    except Mixes as reason:
        raise Mixes(f"{spelled(linear)!r} with {name(linear)}: {reason}") from reason
    if result not in states:
        raise Mixes(f"{spelled(linear)!r} with {name(linear)} does not read its input")
    return states[result]


def name(linear: Node) -> str:
    """Return the type of the weight, for messages."""
    return f"weight of type {type(example(arguments(linear)['weight'])).__name__}"


def _traced(linear: Node) -> Graph:
    if not is_op(linear, "linear"):
        raise Mixes(f"{spelled(linear)!r} computes with a tensor subclass")
    known = linear.meta.get("inside")
    if known is None:
        try:
            known = _trace(linear)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise Mixes(f"{spelled(linear)!r} with {name(linear)} cannot be traced ({why})") from error
        linear.meta["inside"] = known
    return known


def _trace(linear: Node) -> Graph:
    source = arguments(linear)["input"]
    x = example(source)
    sizes = (*STAND_INS[: x.dim() - 1], example(arguments(linear)["weight"]).shape[-1])

    def call(x: torch.Tensor) -> Any:
        args, kwargs = map_arg((linear.args, linear.kwargs), lambda node: x if node is source else example(node))
        return linear.target(*args, **kwargs)  # type: ignore[operator]

    with faking(fake_mode_of([x])):
        stand_in = torch.empty(sizes, dtype=x.dtype, device=x.device)
        module = make_fx(call)(stand_in)
        module = make_fx(torch.func.functionalize(module))(stand_in)  # nothing in place, such as `y += bias`
    for node in module.graph.nodes:
        value = getattr(module, node.target) if node.op == "get_attr" else node.meta.get("val")
        node.meta["example_value"] = value
    return module.graph
