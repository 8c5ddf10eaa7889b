"""The kernels of select_tokens: the same tokens as sorting gives, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.kernels import select_tokens as module
from zipvl_compile.kernels.select_tokens import select_tokens

RULES = ({"tau": 0.5, "keep_recent": 5}, {"tau": 0.975}, {"keep_ratio": 0.3}, {"keep_ratio": 1e-6, "keep_recent": 3})


def scores(n, batch=2, groups=1, seed=0, levels=0):
    """Return skewed scores with some tokens that nobody sees; `levels` makes ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, groups, n, generator=generator) ** 6
    seen = torch.randint(0, 5, (batch, n), generator=generator).float()
    x = x * (seen > 0).unsqueeze(1)
    return ((x * levels).round() / levels if levels else x), seen


def check(x, seen, **rule):
    got, expected = (select_tokens(x, seen, kernel=kernel, **rule) for kernel in ("triton", "torch"))
    assert torch.equal(got, expected)
    return got


@pytest.mark.parametrize("tile", [64, 16384], ids=["many-tiles", "one-tile"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 63, 500, 1025])
def test_every_size(monkeypatch, n, rule, tile):
    monkeypatch.setattr(module, "MAX_BLOCK", tile)
    check(*scores(n), **rule)


@pytest.mark.parametrize("levels", [1, 3, 50])
def test_ties_go_to_the_lower_position(levels):
    for rule in RULES:
        check(*scores(300, levels=levels, seed=levels), **rule)


def test_a_selection_per_kv_head_and_another_for_every_sample():
    kept = check(*scores(200, batch=3, groups=4), tau=0.9)
    assert kept.shape[:2] == (3, 4) and not torch.equal(kept[0, 0], kept[0, 1])


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_keeps_every_token(strange):
    x, seen = scores(70)
    x[1, 0, 3] = strange
    assert check(x, seen, tau=0.9).shape[2] == 70


def test_protected_tokens_come_on_top_of_p():
    x = torch.full((1, 1, 200), 2 / 197)
    x[..., 0], x[..., 50], x[..., 100] = 60.0, 30.0, 8.0  # an attention sink, and two tokens that matter
    for rule in ({"tau": 0.95}, {"keep_ratio": 3 / 200}):
        assert check(x, torch.ones(1, 200), **rule).tolist() == [[[0, 50, 199]]]
        assert check(x, torch.ones(1, 200), keep_recent=64, **rule).tolist() == [[[0, 50, *range(136, 200)]]]


def test_no_attention_at_all_keeps_the_newest():
    x, seen = torch.zeros(1, 1, 9), torch.ones(1, 9)
    assert check(x, seen, tau=0.9).tolist() == [[[8]]]


def test_a_sum_that_meets_tau_exactly():
    assert check(torch.full((1, 1, 8), 0.25), torch.ones(1, 8), tau=0.5).shape[2] == 4


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 200), tau=st.floats(0.01, 0.999), recent=st.integers(1, 9), levels=st.sampled_from([0, 2, 9]),
       seed=st.integers(0, 999))  # fmt: skip
def test_any_scores(n, tau, recent, levels, seed):
    check(*scores(n, seed=seed, levels=levels), tau=tau, keep_recent=recent)
