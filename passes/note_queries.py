"""Keep the queries of the newest tokens, of which a re-selection asks what they attend to.

Before (a cache layer sees no queries, and traced its keys, and its key buffer, in their place):

    queries = room_for_queries(k, reselect_every)                  a prompt; graph output
    note_queries(queries, key_buffer, count)                       a step of decoding; in place

After:

    queries = room_for_queries(q, R)                               R = min(reselect_every, probe rows)
    write_queries(queries, q, count)
"""

from __future__ import annotations

from dataclasses import replace as changed

from torch.fx import Graph

from zipvl_compile.kernels.note_queries import write_queries
from zipvl_compile.passes.graph.evicted_calls import NoteQueriesCall, RoomForQueriesCall
from zipvl_compile.passes.graph.graph import insert_call, replace
from zipvl_compile.passes.graph.op_calls import TokenPositionsCall
from zipvl_compile.passes.match.cache_layers import views_above
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings


def noted_rows(settings: Settings) -> int:
    """Return how many queries measure attention for a re-selection (tokens)."""
    return min(settings.reselect_every, max(settings.probes, 1))


def _give_room(graph: Graph, sites: Sites, settings: Settings) -> None:
    rooms = {call.x: call for call in RoomForQueriesCall.all(graph)}
    for site in sites.prefill:
        assert site.layer is not None
        call = rooms.pop(TokenPositionsCall.read(site.layer).k, None)  # others may read the same layer
        if call is None or call.node is None:
            continue
        new = changed(call, x=site.attention.query, rows=noted_rows(settings)).insert(site.attention.node)
        replace(call.node, new)
        graph.erase_node(call.node)


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Put the queries of the attention that reads a layer in the place of the layer's keys."""
    _give_room(graph, sites, settings)
    notes = {call.x: call for call in NoteQueriesCall.all(graph)}
    for site in sites.decode:
        call = notes.pop(views_above(site.attention)[0].buffer, None)  # others may read the same layer
        if call is not None and call.node is not None:
            arguments = (call.queries, site.attention.query, call.count)
            insert_call(site.attention.node, write_queries, arguments)
            site.noted = call.queries
            graph.erase_node(call.node)
    for call in notes.values():  # of layers that no attention reads
        if call.node is not None:
            graph.erase_node(call.node)
