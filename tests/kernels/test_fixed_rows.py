"""Tensors of fixed size: the sizes of buckets, rows that stay, positions that count on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl_compile.kernels.fixed_rows import LEAST, bucket, fixed_positions, fixed_rows, into_bucket, row_count


@given(st.integers(0, 1 << 20))
def test_a_bucket_wastes_an_eighth_at_most(rows):
    size = bucket(rows)
    assert rows <= size <= max(rows * 9 / 8, LEAST) and bucket(size) == size


def test_eight_buckets_to_an_octave():
    assert sorted({bucket(rows) for rows in range(512, 1025)}) == list(range(512, 1025, 64))


@pytest.mark.parametrize("rows", [0, 5, 8, 16, 17, 100])
def test_keys_get_rows_of_zeros_and_positions_count_on(rows):
    x, size = torch.randn(2, 3, rows, 4), bucket(rows)
    out = into_bucket(x)
    assert out.shape == (2, 3, size, 4) and torch.equal(out[:, :, :rows], x) and not out[:, :, rows:].any()
    where = into_bucket(torch.arange(7, 7 + rows).repeat(2, 1, 1))
    assert where.shape == (2, 1, size)
    assert torch.equal(where[1, 0], torch.arange(7, 7 + size) if rows else torch.arange(size))


def test_a_number_stays_as_it_is():
    count = torch.tensor(7)
    assert into_bucket(count) is count


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match="into_bucket: x: expected a"):
        into_bucket(torch.zeros(2, 9))


def test_where_the_rows_of_a_buffer_stand():
    positions = torch.tensor([[[0, 3, 7]], [[1, 2, 6]]])
    assert fixed_positions(positions, 8, 3).tolist() == [[[0, 3, 7, 8, 9, 10]], [[1, 2, 6, 8, 9, 10]]]
    count = row_count(positions)
    assert count.shape == () and count.dtype == torch.int64 and int(count) == 3


def test_the_marker_changes_nothing():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(fixed_rows(x), x)


def test_they_are_traced():
    def function(positions, x):
        return fixed_positions(positions, 8, 3), row_count(positions), fixed_rows(x * 1)

    positions, x = torch.tensor([[[0, 3, 7]]]), torch.randn(1, 2, 3, 4)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(positions, x), function(positions, x), strict=True):
        assert torch.equal(got, expected)
