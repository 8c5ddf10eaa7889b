"""What a mask says: visibility, and the part of it over chosen rows and columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.kernels.common.masks import causal, rows_that_see, seen, take, visible


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


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("one_row", [True, False])
def test_rows_that_see_count_once_for_all_heads(is_causal, one_row):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 1 if one_row else 6, 6, generator=generator) > 0.6
    rows = torch.tensor([1, 2, 5])
    got = rows_that_see(mask, rows, is_causal, 2, 6, torch.float32)
    assert got.dtype == torch.float32
    for b in range(2):
        for j in range(6):
            shown = [any(mask[b, h, 0 if one_row else i, j] for h in range(3)) for i in rows.tolist()]
            expected = sum(x and (not is_causal or j <= i) for x, i in zip(shown, rows.tolist(), strict=True))
            assert got[b, j] == expected


@pytest.mark.parametrize(("is_causal", "expected"), [(True, [3, 3, 2, 1, 1, 1]), (False, [3] * 6)])
def test_rows_that_see_without_a_mask(is_causal, expected):
    rows = torch.tensor([1, 2, 5])
    assert rows_that_see(None, rows, is_causal, 2, 6, torch.float64).tolist() == [expected] * 2


def test_seen_rows_of_a_shared_mask_are_still_causal():
    mask = torch.tensor([True, False, True, True]).view(1, 1, 1, 4)
    expected = [[True, False, False, False], [True, False, True, True]]
    assert seen(mask, torch.tensor([0, 3]), True).tolist() == [[expected]]
    assert seen(mask, torch.tensor([0, 3]), False).tolist() == [[[[True, False, True, True]] * 2]]
