"""Budget: how many tokens, and its numbers as a tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl_compile.kernels.budget import Budget, portion

numbers = st.builds(
    Budget, tau=st.floats(0.01, 1.0), keep_ratio=st.none() | st.floats(0.01, 1.0),
    keep_tokens=st.none() | st.integers(1, 10**6), floor=st.floats(0.0, 1.0),
)  # fmt: skip


@given(numbers)
def test_a_budget_survives_the_way_through_a_tensor(budget):
    budget.check("test")
    assert budget.as_tensor().shape == (4,) and budget.as_tensor().dtype == torch.float64
    assert Budget.read(budget.as_tensor()) == budget


@given(n=st.integers(0, 10**5), percent=st.integers(0, 100))
def test_a_portion_is_the_exact_ceiling(n, percent):
    assert portion(n, percent / 100) == math.ceil(n * percent / 100 - 1e-9)


@pytest.mark.parametrize(
    ("budget", "n", "least", "fixed"),
    [
        (Budget(), 100, 1, False), (Budget(floor=0.25), 100, 25, False), (Budget(tau=1.0), 100, 100, True),
        (Budget(keep_ratio=0.3), 100, 30, True), (Budget(keep_ratio=0.3, floor=0.5), 100, 50, True),
        (Budget(keep_tokens=7), 100, 7, True), (Budget(keep_tokens=7, floor=0.5), 100, 50, True),
        (Budget(tau=1.0, keep_tokens=7), 100, 7, True), (Budget(keep_ratio=1e-6), 100, 1, True),
    ],
)  # fmt: skip
def test_the_least_that_is_kept(budget, n, least, fixed):
    assert (budget.least(n), budget.fixed) == (least, fixed)
