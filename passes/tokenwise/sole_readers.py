"""What is computed for a tensor alone, token by token, and so need not be computed for tokens that nobody reads.

h = norm(x)                                   read by the projections of q, k and v: rows are taken here
v = linear(h, w).view(...).transpose(1, 2)    read by nothing but v's reader: computed for the rows that it reads
"""

from __future__ import annotations

import contextlib

from torch.fx import Graph, Node

from zipvl_compile.passes.graph.graph import erase_unread, replace, undone_on_error
from zipvl_compile.passes.graph.private import ENTER_AUTOCAST, EXIT_AUTOCAST
from zipvl_compile.passes.graph.reading import changed_in_place, spelled
from zipvl_compile.passes.tokenwise import backward_slice
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import Cone, multiplies, reads_size
from zipvl_compile.passes.tokenwise.row_select import OfEachSample, Shared
from zipvl_compile.passes.tokenwise.split_projections import split_above


def computed_only_for(x: Node, axes: Axes, readers: set[Node]) -> Cone:
    """Return what computes `x` token by token and is read by nothing but `readers` in the end.

    Raises:
        Mixes: there is no projection among it; the message says why.
    """
    others = [user for user in x.users if user not in readers and not reads_size(user)]
    if others:
        raise Mixes(f"read by {spelled(others[0])!r} as well")
    cone = _cone(x, axes)
    if not any(map(multiplies, cone.nodes)) and split_above(cone):
        cone = _cone(x, axes)
    if not any(map(multiplies, cone.nodes)):
        stops = [cone.stops[node] for node in sorted(cone.stops, reverse=True)]
        raise Mixes(stops[0] if stops else "its projection gives other tensors, too")
    _check_sources(cone)
    return cone


def raise_rows(kept: Shared | OfEachSample) -> None:
    """Take rows from further up, where nothing else is read and what is above treats each token by itself.

    norm(x)[rows]  ->  norm(x[rows])          where q, k and v read those rows only

    What was put back for the sake of such readers alone is not put back any more.
    """
    for (x, axes), taken in list(kept.taken.items()):
        if x._erased or taken._erased or any(user is not taken and not reads_size(user) for user in x.users):
            continue
        with contextlib.suppress(Mixes), undone_on_error(x.graph):
            cone = _cone(x, axes)
            if not cone.nodes:
                continue
            _check_sources(cone)
            rows = {source: kept.take(source, own, taken) for source, own in cone.sources.items()}
            replace(taken, cone.again(rows, kept.count, taken)[x])
            erase_unread([taken])
            cone.erase()
    erase_unread(full for full, _ in kept.under)


def _cone(x: Node, axes: Axes) -> Cone:
    autocast = under_autocast(x.graph)

    def shared(node: Node, cone: Cone) -> bool:
        users = [user for user in node.users if user not in cone.nodes and not reads_size(user)]
        return node in autocast or (node is not x and bool(users))

    return backward_slice.find(x.graph, {x: axes}, shared)


def _check_sources(cone: Cone) -> None:
    for source in cone.sources:
        if changed_in_place(source):
            raise Mixes(f"the result of {spelled(source)!r} is changed in place")


def under_autocast(graph: Graph) -> set[Node]:
    """Return the nodes inside `with torch.autocast(...)`: moved out of it they would compute in another dtype."""
    inside, depth = set(), 0
    for node in graph.nodes:
        depth += (node.target is ENTER_AUTOCAST) - (node.target is EXIT_AUTOCAST)
        if depth:
            inside.add(node)
    return inside
