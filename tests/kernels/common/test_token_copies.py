"""Copies of chosen token rows: whole rows on a CPU, `gather` and `scatter` elsewhere, bit for bit the same."""

import pytest
import torch
from support.implementations import only

from zipvl_compile.kernels.common.token_copies import put_rows, take_rows

everywhere = only("torch", "cuda")


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@everywhere
def test_take_rows(implementation, cases, groups, strided):
    x, positions = torch.randn(3, 4, 9, 5), cases.choose(3, groups, 9, 4)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x
    out = implementation.compute(take_rows, x, positions, torch.full((3, 4, 4, 5), float("nan")))
    for b in range(3):
        for h in range(4):
            assert torch.equal(out[b, h], x[b, h][positions[b, h * groups // 4]])


@pytest.mark.parametrize("groups", [1, 2, 4])
@everywhere
def test_put_rows_writes_those_rows_only(implementation, cases, groups):
    x, positions = torch.randn(3, 4, 4, 5), cases.choose(3, groups, 9, 4)
    out = implementation.compute(put_rows, x, positions, torch.full((3, 4, 9, 5), 7.0))
    for b in range(3):
        for h in range(4):
            expected = torch.full((9, 5), 7.0)
            expected[positions[b, h * groups // 4]] = x[b, h]
            assert torch.equal(out[b, h], expected)


@everywhere
def test_what_was_put_is_taken(implementation, cases):
    x, positions = torch.randn(2, 4, 4, 5), cases.choose(2, 2, 9, 4)
    whole = implementation.compute(put_rows, x, positions, torch.zeros(2, 4, 9, 5))
    assert torch.equal(implementation.compute(take_rows, whole, positions, torch.empty(2, 4, 4, 5)), x)


@everywhere
def test_a_part_of_a_larger_buffer_is_written(implementation, cases):
    x, positions = torch.randn(2, 2, 9, 5), cases.choose(2, 1, 9, 4)
    buffer, x, positions = implementation.given(torch.zeros(2, 2, 7, 5), x, positions)
    take_rows(x, positions, buffer[:, :, :4])
    assert not buffer[:, :, 4:].any() and torch.equal(buffer[0, :, :4], x[0][:, positions[0, 0]])
