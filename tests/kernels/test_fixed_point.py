"""Scores as integers: sums that do not depend on the order of their parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl_compile.kernels.fixed_point import FIXED, from_fixed_point, to_fixed_point
from zipvl_compile.kernels.select_tokens import select_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(ranks=st.integers(1, 64), seed=st.integers(0, 1000), wide=st.sampled_from([1e-6, 1.0, 4000.0]))
def test_sums_in_any_order_are_the_same_bits_and_close_to_those_of_floats(dtype, ranks, seed, wide):
    generator = torch.Generator().manual_seed(seed)
    parts = wide * torch.rand(ranks, 2, 1, 17, generator=generator, dtype=dtype) / ranks
    whole = torch.stack([to_fixed_point(one, ranks) for one in parts])
    order = torch.randperm(ranks, generator=generator)
    sums, others = (from_fixed_point(x.sum(0), ranks, dtype) for x in (whole, whole[order]))
    assert sums.dtype == dtype and torch.equal(sums, others)
    torch.testing.assert_close(sums, parts.double().sum(0).to(dtype), rtol=1e-6, atol=ranks / FIXED)


def test_what_is_above_zero_stays_above_what_no_row_may_see():
    scores = torch.tensor([[[0.0, 1e-30, 0.0]]])
    found = from_fixed_point(to_fixed_point(scores, 2), 2, scores.dtype)
    assert (found > 0).tolist() == (scores > 0).tolist()


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("everywhere", [False, True], ids=["on one rank", "on all ranks"])
def test_what_is_not_finite_keeps_every_token(ranks, wrong, everywhere):
    parts = torch.rand(ranks, 1, 1, 9)
    parts[: ranks if everywhere else 1, ..., 3] = wrong
    sums = from_fixed_point(sum(to_fixed_point(one, ranks) for one in parts), ranks, torch.float32)
    assert sums.isfinite().tolist() == [[[j != 3 for j in range(9)]]]
    assert select_tokens(sums, torch.ones(1, 9, dtype=torch.int64), tau=0.5).shape[2] == 9
