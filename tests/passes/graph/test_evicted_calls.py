"""The views of the operators behind `evict` and `reselect_every` read what the cache layers trace."""

from torch.fx import Graph

from zipvl_compile.passes.graph.evicted_calls import NoteQueriesCall, RestoreTokensCall, RoomForQueriesCall, ToHostCall


def test_what_is_inserted_is_read_again():
    graph = Graph()
    k, positions, others = (graph.placeholder(name) for name in ("k", "positions", "others"))
    output = graph.output(())
    host = ToHostCall(x=k, others=others).insert(output)
    whole = RestoreTokensCall(kept=k, positions=positions, others=host, scales=None, n=5).insert(output)
    room = RoomForQueriesCall(x=k, rows=3).insert(output)
    note = NoteQueriesCall(queries=room, x=k, count=1).insert(output)
    assert RestoreTokensCall.read(whole).others is host and NoteQueriesCall.read(note).queries is room
    assert ToHostCall.matches(host) and not ToHostCall.matches(whole) and RoomForQueriesCall.read(room).rows == 3
