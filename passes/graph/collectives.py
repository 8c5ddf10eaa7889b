"""What a graph tells of other ranks: weights that are spread over them, and sums over them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from zipvl_compile.kernels.fixed_point import from_fixed_point, to_fixed_point
from zipvl_compile.passes.graph.graph import insert_call
from zipvl_compile.passes.graph.private import COLLECTIVES
from zipvl_compile.passes.graph.reading import arguments, example, is_op

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor
else:  # a build without it has no ranks
    DTensor = type(None)  # type: ignore[assignment, misc]


BETWEEN = ("_c10d_functional", "c10d::")  # how the names of operators between ranks begin


class Uneven(Exception):
    """The ranks of a group hold parts of different sizes."""


def is_spread(value: Any) -> bool:
    """Return whether a value is a DTensor."""
    return isinstance(value, torch.Tensor) and isinstance(value, DTensor)


def groups(value: Any) -> set[str]:
    """Return the names of the process groups over whose ranks a value is spread, each with a part of its own.

    Raises:
        Uneven: the parts are not of one size.
    """
    found: set[str] = set()
    if not is_spread(value):
        return found
    for axis, placement in enumerate(value.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard() or value.shape[placement.dim] % value.device_mesh.size(axis):
            raise Uneven
        found.add(value.device_mesh.get_group(axis).group_name)
    return found


def communicates(node: Node) -> bool:
    """Return whether a node moves data between ranks, or returns what is spread over them."""
    if node.op not in ("call_function", "call_method"):
        return False
    return _operator(node).startswith(BETWEEN) or is_spread(example(node))


def in_use(graph: Graph) -> bool:
    """Return whether anything in a graph moves data between ranks, or is spread over them."""
    inputs = graph.find_nodes(op="placeholder")
    return any(map(communicates, graph.nodes)) or any(groups(example(node)) for node in inputs)


def are_several() -> bool:
    """Return whether this process is one of several ranks."""
    ranks = torch.distributed
    return ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1


def summed_over(node: Node) -> str | None:
    """Return the name of the process group over which a node sums, or None."""
    if not is_op(node, "all_reduce"):
        return None
    given = arguments(node)
    return str(given["group_name"]) if given["reduce_op"] == "sum" else None


def insert_sum(scores: Node, group: str, before: Node) -> Node:
    """Insert the sum of scores, not negative, over the ranks of a group before a node: the same bits on all of them."""
    ranks = torch.distributed.get_world_size()  # as many as the group has, or more
    parts = insert_call(before, to_fixed_point, (scores, ranks))
    parts = insert_call(before, COLLECTIVES.all_reduce, (parts, "sum", group))
    sums = insert_call(before, COLLECTIVES.wait_tensor, (parts,))
    return insert_call(before, from_fixed_point, (sums, ranks, example(scores).dtype))


def _operator(node: Node) -> str:
    """Return the name of the operator that a node calls, as "aten::add"; empty where it calls none."""
    target: Any = node.target
    return str(getattr(getattr(target, "overloadpacket", target), "_qualified_op_name", ""))
