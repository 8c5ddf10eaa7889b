"""Queries of the newest tokens in a ring: whatever the steps, the newest R are there, in order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl_compile.kernels.note_queries import in_order, note_queries, room_for_queries, write_queries


@given(rows=st.integers(1, 9), steps=st.lists(st.integers(1, 14), min_size=1, max_size=12))
def test_the_newest_are_there_in_order(rows, steps):
    every = torch.arange(float(sum(steps))).reshape(1, 1, -1, 1).repeat(2, 3, 1, 4)
    queries, count = room_for_queries(every, rows), 0
    for m in steps:
        write_queries(queries, every[:, :, count : count + m], count)
        count += m
    if count >= rows:
        assert torch.equal(in_order(queries, count), every[:, :, count - rows :])
    else:
        assert torch.equal(queries[:, :, :count], every) and not queries[:, :, count:].any()


def test_what_is_taken_back_is_written_over():
    queries = room_for_queries(torch.zeros(1, 1, 1, 1), 8)
    write_queries(queries, torch.full((1, 1, 5, 1), 7.0), 0)
    write_queries(queries, torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1), 2)  # three of the five were drafts
    assert queries.flatten().tolist() == [7, 7, 1, 2, 7, 0, 0, 0]


def test_the_marker_writes_the_same_and_takes_no_keys():
    queries = torch.zeros(1, 4, 3, 2)
    note_queries(queries, torch.ones(1, 4, 1, 2), 4)
    assert queries[0, 0, :, 0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="note_queries: x: expected queries like"):
        note_queries(queries, torch.ones(1, 2, 1, 2), 5)
