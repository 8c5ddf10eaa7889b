"""What a mask says: visibility, and the part of it over chosen rows and columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.kernels.common.masks import causal, take, visible
from zipvl_compile.kernels.hiding_rows import hiding_rows
from zipvl_compile.kernels.sparse_attention import sparse_attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_additive_mask_hides_with_inf_or_the_lowest_number_and_not_with_a_bias(dtype):
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([0.0, -50.0, -1e4, 3.0, float("-inf"), lowest], dtype=torch.float64).to(dtype)
    assert visible(mask).tolist() == [True, True, True, True, False, False]


def test_bool_mask_says_it_itself():
    mask = torch.tensor([True, False])
    assert visible(mask) is mask


def test_causal_is_inclusive():
    assert causal(torch.tensor([0, 2]), torch.tensor([0, 1, 2, 3])).int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    mask_batch=st.booleans(),
    mask_heads=st.booleans(),
    rows=st.sampled_from([None, 1, 4]),
    columns=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_take_is_indexing_per_sample_and_head(mask_batch, mask_heads, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (3 if mask_batch else 1, 4 if mask_heads else 1, 5, 7)
    mask = torch.rand(shape, generator=generator)
    rows_ = None if rows is None else torch.randint(0, 5, (3, rows, 2), generator=generator)
    columns_ = None if columns is None else torch.randint(0, 7, (3, columns, 3), generator=generator)
    out = take(mask, 3, rows_, columns_)
    heads = max(shape[1], rows or 1, columns or 1)
    assert out.shape == (3, heads, 5 if rows is None else 2, 7 if columns is None else 3)
    wide = mask.expand(3, heads, 5, 7)
    for b in range(3):
        for h in range(heads):
            i = slice(None) if rows is None else rows_[b, h % rows]
            j = slice(None) if columns is None else columns_[b, h % columns]
            assert torch.equal(out[b, h], wide[b, h][i][:, j])


def test_a_mask_that_hides_nothing_becomes_one_of_no_samples():
    row = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert hiding_rows(row).shape == (0, 1, 1, 9)
    row[1, 0, 0, :3] = False
    copy = hiding_rows(row)
    assert torch.equal(copy, row) and copy.data_ptr() != row.data_ptr()


def test_attention_reads_a_mask_of_no_samples_as_none():
    q, k, v = torch.randn(3, 2, 2, 9, 4)
    positions = torch.tensor([[[0, 3, 8]]]).repeat(2, 1, 1)
    kept = k[:, :, [0, 3, 8]], v[:, :, [0, 3, 8]]
    nothing = torch.ones(0, 1, 1, 9, dtype=torch.bool)
    assert torch.equal(sparse_attention(q, *kept, positions, nothing), sparse_attention(q, *kept, positions))
