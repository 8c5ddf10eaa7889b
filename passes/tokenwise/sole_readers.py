"""What is computed for a tensor alone, token by token, and so need not be computed for tokens that nobody reads.

h = norm(x)                                   read by the projections of q, k and v: rows are taken here
v = linear(h, w).view(...).transpose(1, 2)    read by nothing but v's reader: computed for the rows that it reads
"""

from __future__ import annotations

from torch.fx import Graph, Node

from zipvl_compile.passes.graph.private import ENTER_AUTOCAST, EXIT_AUTOCAST
from zipvl_compile.passes.graph.reading import changed_in_place, spelled
from zipvl_compile.passes.tokenwise import backward_slice
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import Axes, Cone, multiplies, reads_size
from zipvl_compile.passes.tokenwise.split_projections import split_above


def computed_only_for(x: Node, axes: Axes, readers: set[Node]) -> Cone:
    """Return what computes `x` token by token and is read by nothing but `readers` in the end.

    Raises:
        Mixes: there is no projection among it; the message says why.
    """
    others = [user for user in x.users if user not in readers and not reads_size(user)]
    if others:
        raise Mixes(f"read by {spelled(others[0])!r} as well")
    graph, autocast = x.graph, under_autocast(x.graph)

    def shared(node: Node, cone: Cone) -> bool:
        users = [user for user in node.users if user not in cone.nodes and not reads_size(user)]
        return node in autocast or (node is not x and bool(users))

    cone = backward_slice.find(graph, {x: axes}, shared)
    if not any(map(multiplies, cone.nodes)) and split_above(cone):
        cone = backward_slice.find(graph, {x: axes}, shared)
    if not any(map(multiplies, cone.nodes)):
        stops = [cone.stops[node] for node in sorted(cone.stops, reverse=True)]
        raise Mixes(stops[0] if stops else "its projection gives other tensors, too")
    for source in cone.sources:
        if changed_in_place(source):
            raise Mixes(f"the result of {spelled(source)!r} is changed in place")
    return cone


def under_autocast(graph: Graph) -> set[Node]:
    """Return the nodes inside `with torch.autocast(...)`: moved out of it they would compute in another dtype."""
    inside, depth = set(), 0
    for node in graph.nodes:
        depth += (node.target is ENTER_AUTOCAST) - (node.target is EXIT_AUTOCAST)
        if depth:
            inside.add(node)
    return inside
