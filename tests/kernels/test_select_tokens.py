"""select_tokens against the float64 model: how many tokens, which ones, in which order; the kernels bit for bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare_kernels import KERNELS
from support.implementations import gpu_only, triton_only
from support.scores import RULES, drawn, same

from zipvl_compile.kernels.budget import Budget
from zipvl_compile.kernels.select_tokens import select_tokens
from zipvl_compile.kernels.token_scores import token_scores

TAUS = [0.5, 0.9, 0.975, 1.0]
BUDGETS = {
    "tokens": {"keep_tokens": 7},
    "more tokens than there are": {"keep_tokens": 700},
    "floor under tau": {"tau": 0.5, "floor": 0.4},
    "floor below tau": {"tau": 0.9, "floor": 0.01},
    "floor under a ratio": {"keep_ratio": 0.2, "floor": 0.3},
    "first": {"tau": 0.5, "keep_first": 4},
    "first and newest": {"keep_tokens": 3, "keep_first": 2, "keep_recent": 6},
}


def scores(*rows, visible=None):
    """Return accumulated `[B, 1, n]` and visible `[B, n]` of the given rows; all tokens equally visible by default."""
    accumulated = torch.tensor(rows, dtype=torch.float64).unsqueeze(1)
    seen = torch.ones_like(accumulated[:, 0]) if visible is None else torch.tensor(visible, dtype=torch.float64)
    return accumulated, seen


def select(implementation, accumulated, visible, **options):
    """Return a selection from scores in the finest dtype that the implementation takes."""
    return implementation.run(
        select_tokens, accumulated.to(implementation.finest), visible.to(implementation.finest), **options
    )


def check(paper, accumulated, visible, **options):
    """Compare a selection with the model and return it."""
    kept = select_tokens(accumulated, visible, **options)
    assert kept.dtype == torch.int64
    assert np.array_equal(kept.numpy(), paper.selection(paper.array(accumulated), paper.array(visible), **options))
    return kept


@pytest.mark.parametrize("keep_recent", [1, 5])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("mask", ["none", "left-padding", "right-padding", "prefix", "per-head-window"])
@pytest.mark.parametrize("n", [1, 2, 63, 129])
def test_tau(paper, cases, n, mask, tau, keep_recent):
    q, k, _ = cases.qkv(batch=3, heads="mqa", n=n, dim=8)
    probes = {"recent_probes": 16, "random_probes": 16}
    accumulated, visible = token_scores(q, k, cases.mask(mask, 3, 4, n), is_causal=mask == "none", **probes)
    kept = check(paper, accumulated, visible, tau=tau, keep_recent=keep_recent)
    assert tau == 1 or n < 63 or kept.shape[2] < n, "the case must select something"


@pytest.mark.parametrize("keep_recent", [1, 5])
@pytest.mark.parametrize("ratio", [1e-9, 0.01, 0.1, 1 / 3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("n", [1, 2, 63, 500])
def test_keep_ratio(paper, cases, n, ratio, keep_recent):
    q, k, _ = cases.qkv(batch=2, heads="mqa", n=n, dim=8)
    accumulated, visible = token_scores(q, k, recent_probes=8, random_probes=8)
    kept = check(paper, accumulated, visible, keep_ratio=ratio, keep_recent=keep_recent)
    assert (kept[..., -1] == n - 1).all()


@pytest.mark.parametrize("ranked", [False, True], ids=["paper", "ranking"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("n", [1, 20, 129])
def test_budgets(paper, implementation, n, budget, ranked):
    accumulated, visible = drawn(n, batch=3, seed=n)
    options = BUDGETS[budget]
    if ranked:
        ranking, _ = drawn(n, batch=3, seed=n + 1)
        options = options | {"ranking": (ranking * (visible > 0).unsqueeze(1)).to(implementation.finest)}
    got = select(implementation, accumulated, visible, **options)
    asked = options | ({"ranking": paper.array(options["ranking"])} if ranked else {})
    accumulated, visible = (paper.array(x.to(implementation.finest)) for x in (accumulated, visible))
    assert np.array_equal(got.numpy(), paper.selection(accumulated, visible, **asked))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("compiled", [{"tau": 0.975}, {"keep_ratio": 0.5}, {"keep_tokens": 2}], ids=str)
def test_a_budget_tensor_stands_for_the_numbers(budget, compiled):
    accumulated, visible = drawn(90, batch=2)
    numbers = {name: x for name, x in BUDGETS[budget].items() if name in ("tau", "keep_ratio", "keep_tokens", "floor")}
    others = {name: x for name, x in BUDGETS[budget].items() if name not in numbers}
    found = select_tokens(accumulated, visible, **compiled, **others, budget=Budget(**numbers).as_tensor())
    assert torch.equal(found, select_tokens(accumulated, visible, **BUDGETS[budget]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_selection_per_kv_head(paper, cases, dtype):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=63, dim=8, dtype=dtype)
    accumulated, visible = token_scores(q, k, groups=2)
    kept = check(paper, accumulated, visible, tau=0.8)
    assert kept.shape[1] == 2 and not torch.equal(kept[:, 0], kept[:, 1])


def test_p_is_the_largest_need_of_the_batch(implementation):
    even, peaked = [1.0] * 8, [8.0] + [0.0] * 7
    assert select(implementation, *scores(peaked), tau=0.5).shape == (1, 1, 1)
    assert select(implementation, *scores(even, peaked), tau=0.5).shape == (2, 1, 4)
    assert select(implementation, *scores(peaked, even), tau=0.5).shape == (2, 1, 4)


def test_ties_go_to_the_lower_position(implementation):
    assert select(implementation, *scores([1.0] * 8), tau=0.5).tolist() == [[[0, 1, 2, 7]]]


def test_reaching_tau_exactly_is_enough(implementation):
    assert select(implementation, *scores([4.0, 2.0, 1.0, 1.0]), tau=0.75).shape[2] == 2
    assert select(implementation, *scores([4.0, 2.0, 1.0, 1.0]), tau=0.7501).shape[2] == 3


def test_normalised_score_ranks_and_accumulated_score_counts(implementation):
    accumulated, visible = scores([5.0, 3.0, 1.0], visible=[[9.0, 3.0, 1.0]])
    assert select(implementation, accumulated, visible, tau=0.8).tolist() == [[[1, 2]]]


def test_invisible_token_comes_last(implementation):
    accumulated, visible = scores([0.0, 1.0, 1.0, 1.0], visible=[[0.0, 3.0, 2.0, 1.0]])
    assert select(implementation, accumulated, visible, keep_ratio=0.75).tolist() == [[[1, 2, 3]]]


def test_newest_tokens_are_kept_whatever_they_score(implementation):
    assert select(implementation, *scores([1.0] + [0.0] * 7), tau=0.9).tolist() == [[[7]]]
    assert select(implementation, *scores([1.0] + [0.0] * 7), tau=0.9, keep_recent=3).tolist() == [[[5, 6, 7]]]


def test_newest_token_of_a_right_padded_sample_is_its_last_real_one(implementation):
    accumulated, visible = scores([9.0, 1.0, 0.0, 0.0, 0.0], visible=[[5.0, 4.0, 3.0, 0.0, 0.0]])
    assert select(implementation, accumulated, visible, tau=0.95).tolist() == [[[0, 2]]]


def test_a_budget_below_keep_recent_still_keeps_the_newest_tokens(implementation):
    kept = select(implementation, *scores([1.0] * 10), keep_ratio=0.1, keep_recent=5)
    assert kept.tolist() == [[[5, 6, 7, 8, 9]]]


@pytest.mark.parametrize("rule", [{"tau": 0.95}, {"keep_ratio": 3 / 200}], ids=str)
def test_protected_tokens_come_on_top_of_p(implementation, rule):
    row = [2 / 197] * 200
    row[0], row[50], row[100] = 60.0, 30.0, 8.0  # an attention sink, and two tokens that matter
    assert select(implementation, *scores(row), **rule).tolist() == [[[0, 50, 199]]]
    assert select(implementation, *scores(row), keep_recent=64, **rule).tolist() == [[[0, 50, *range(136, 200)]]]


def test_keep_recent_longer_than_the_prompt_keeps_everything(implementation):
    assert select(implementation, *scores([1.0] * 4), tau=0.5, keep_recent=50).tolist() == [[[0, 1, 2, 3]]]


PROTECTED = {
    "one": [4],
    "several, in any order": [30, 2, 17, 9],
    "from the end": [-1, -12],
    "twice": [5, 5, 6],
    "invisible": [0, 1],
    "none": [],
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("form", PROTECTED)
def test_protected_tokens_come_on_top_wherever_they_stand(paper, implementation, form, rule):
    accumulated, visible = drawn(40, seed=3)
    visible[:, :2], accumulated[..., :2] = 0, 0
    rows = torch.tensor(PROTECTED[form], dtype=torch.int64)
    kept = same(implementation, accumulated, visible, protected=rows, **rule)
    expected = paper.selection(paper.array(accumulated), paper.array(visible), protected=PROTECTED[form], **rule)
    assert np.array_equal(kept.numpy(), expected)
    plain = select_tokens(accumulated, visible, **rule)
    assert kept.shape[2] == min(plain.shape[2] + len(rows), 40)
    for sample, before in zip(kept[:, 0].tolist(), plain[:, 0].tolist(), strict=True):
        assert set(sample) >= set(before) | set((rows % 40).tolist()), "nothing is displaced"


@pytest.mark.parametrize("n", [1, 5])
def test_more_protected_tokens_than_there_are(implementation, n):
    rows = torch.arange(n).repeat(3)
    assert select(implementation, *scores([1.0] * n), tau=0.5, protected=rows).tolist() == [[[*range(n)]]]


@gpu_only
@pytest.mark.parametrize("n", [100, 20_000, 70_000])
def test_protected_tokens_of_long_prompts_on_a_gpu(implementation, n):
    accumulated, visible = drawn(n, seed=n)
    rows = torch.randint(0, n, (64,), generator=torch.Generator().manual_seed(n))
    kept = same(implementation, accumulated, visible, tau=0.9, protected=rows)
    assert set(rows.tolist()) <= set(kept[0, 0].tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_score_keeps_every_token(implementation, bad):
    accumulated, visible = scores([5.0, bad, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0])
    assert select(implementation, accumulated, visible, tau=0.5).tolist() == [[[0, 1, 2, 3]]] * 2


def test_a_sample_of_padding_only_follows_the_others(implementation):
    accumulated, visible = scores([4.0, 4.0, 0.0, 0.0], [0.0] * 4, visible=[[4.0, 3.0, 2.0, 1.0], [0.0] * 4])
    assert select(implementation, accumulated, visible, tau=0.9).tolist() == [[[1, 3]], [[0, 1]]]


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"tau": 1.0}, {"keep_ratio": 0.5}], ids=str)
@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)], ids=["no-sample", "no-token"])
def test_empty_scores(implementation, batch, n, options):
    kept = select(implementation, torch.zeros(batch, 1, n), torch.zeros(batch, n), **options)
    assert kept.shape[:2] == (batch, 1) and kept.dtype == torch.int64 and kept.shape[2] <= n


def test_inputs_stay_as_they_are(implementation):
    given_ = scores([5.0, 3.0, 1.0], visible=[[9.0, 3.0, 1.0]])
    given_ = implementation.given(*(x.to(implementation.finest) for x in given_))
    copies = [x.clone() for x in given_]
    select_tokens(*given_, tau=0.5, kernel=implementation.kernel)
    assert all(torch.equal(x, copy) for x, copy in zip(given_, copies, strict=True))


@pytest.mark.parametrize("levels", [1, 3, 50])
@triton_only
def test_ties_of_many_tokens(implementation, levels):
    for rule in RULES:
        same(implementation, *drawn(300, levels=levels, seed=levels), **rule)


@triton_only
def test_a_selection_per_kv_head_and_another_for_every_sample(implementation):
    kept = same(implementation, *drawn(200, batch=3, groups=4), tau=0.9)
    assert kept.shape[:2] == (3, 4) and not torch.equal(kept[0, 0], kept[0, 1])


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_keeps_every_token(implementation, strange):
    x, seen = drawn(70)
    x[1, 0, 3] = strange
    assert same(implementation, x, seen, tau=0.9).shape[2] == 70


def test_no_attention_at_all_keeps_the_newest(implementation):
    assert same(implementation, torch.zeros(1, 1, 9), torch.ones(1, 9), tau=0.9).tolist() == [[[8]]]


def test_a_sum_that_meets_tau_exactly(implementation):
    assert same(implementation, torch.full((1, 1, 8), 0.25), torch.ones(1, 8), tau=0.5).shape[2] == 4


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 200), tau=st.floats(0.01, 0.999), recent=st.integers(1, 9), levels=st.sampled_from([0, 2, 9]),
       seed=st.integers(0, 999))  # fmt: skip
@triton_only
def test_any_scores(implementation, n, tau, recent, levels, seed):
    same(implementation, *drawn(n, seed=seed, levels=levels), tau=tau, keep_recent=recent)


@pytest.mark.parametrize("rule", [{"tau": 0.9}, {"tau": 0.5, "keep_recent": 9}, {"keep_ratio": 0.3}], ids=str)
@pytest.mark.parametrize("n", [1, 63, 500, 1025, 16384, 50_000])
@gpu_only
def test_selection_is_the_same_on_every_device(implementation, n, rule):
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(2, 2, n, generator=generator) ** 6
    seen = torch.randint(0, 5, (2, n), generator=generator).float()
    for accumulated in (x, (x * 8).round() / 8):
        for kernel in KERNELS:
            same(implementation, accumulated, seen, kernel=kernel, **rule)


numbers = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(row=numbers, tau=st.floats(0.01, 1.0), keep_recent=st.integers(1, 6))
def test_p_is_minimal(row, tau, keep_recent):
    count = select_tokens(*scores([float(x) for x in row]), tau=tau, keep_recent=keep_recent).shape[2]
    p, largest = count - keep_recent + 1, sorted(row, reverse=True)
    if count < len(row):
        assert sum(largest[:p]) >= tau * sum(row) * (1 - 1e-12)
    if tau < 1 and p > 1:
        assert sum(largest[: p - 1]) < tau * sum(row) * (1 + 1e-12)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(row=numbers, other=numbers, tau=st.floats(0.01, 1.0), keep_recent=st.integers(1, 6))
def test_positions_are_ascending_unique_in_range_and_hold_the_newest(row, other, tau, keep_recent):
    n = min(len(row), len(other))
    kept = select_tokens(
        *scores([float(x) for x in row[:n]], [float(x) for x in other[:n]]), tau=tau, keep_recent=keep_recent
    )
    for positions in kept[:, 0].tolist():
        assert positions == sorted(set(positions))
        assert min(positions) >= 0 and max(positions) < n
        assert set(range(max(0, n - keep_recent), n)) <= set(positions)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(row=numbers, taus=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)))
def test_growing_tau_only_adds_tokens(row, taus):
    few, many = (
        set(select_tokens(*scores([float(x) for x in row]), tau=tau).flatten().tolist()) for tau in sorted(taus)
    )
    assert few <= many


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(row=numbers, share=st.floats(0.01, 1.0), rule=st.sampled_from(["tau", "keep_ratio"]), more=st.integers(2, 50))
def test_protecting_more_tokens_drops_none(row, share, rule, more):
    given_, rule_ = scores([float(x) for x in row]), {rule: share}
    few, many = (select_tokens(*given_, keep_recent=count, **rule_)[0, 0].tolist() for count in (1, more))
    assert set(few) <= set(many)
    assert len(many) == min(len(few) + more - 1, len(row))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(row=numbers, tau=st.floats(0.01, 1.0))
def test_another_sample_changes_only_p(row, tau):
    row = [float(x) for x in row]
    alone = set(select_tokens(*scores(row), tau=tau).flatten().tolist())
    together = select_tokens(*scores(row, [1.0] * len(row)), tau=tau)
    assert alone <= set(together[0, 0].tolist())
    same_p = select_tokens(*scores(row), keep_ratio=together.shape[2] / len(row))
    assert torch.equal(same_p[0], together[0])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(n=st.integers(0, 10_000), percent=st.integers(1, 100))
def test_a_fixed_ratio_is_the_exact_ceiling(n, percent):
    exact = math.ceil(n * percent / 100 - 1e-9)
    assert Budget(keep_ratio=percent / 100).least(n) == max(exact, 1)


BAD = {
    "tau-0": ({"tau": 0.0}, "tau: expected a fraction in (0, 1], got 0.0"),
    "tau-2": ({"tau": 2.0}, "tau: expected a fraction in (0, 1], got 2.0"),
    "tau-nan": ({"tau": float("nan")}, "tau: expected a fraction in (0, 1], got nan"),
    "keep_ratio-0": ({"keep_ratio": 0.0}, "keep_ratio: expected a fraction in (0, 1], got 0.0"),
    "keep_ratio-negative": ({"keep_ratio": -0.5}, "keep_ratio: expected a fraction in (0, 1], got -0.5"),
    "keep_tokens": ({"keep_tokens": 0}, "keep_tokens: expected at least 1 token, got 0"),
    "floor": ({"floor": 1.5}, "floor: expected a fraction in [0, 1], got 1.5"),
    "keep_first": ({"keep_first": -1}, "keep_first: expected at least 0 tokens, got -1"),
    "ranking": ({"ranking": torch.ones(2, 1, 5)}, "ranking: expected scores [2, 1, 6], got [2, 1, 5]"),
    "keep_recent": ({"keep_recent": 0}, "keep_recent: expected at least 1 token, got 0"),
    "protected-rank": ({"protected": torch.tensor([[1]])}, "protected: expected positions, int64 [m], got torch.int64"),
    "protected-dtype": ({"protected": torch.tensor([1.0])}, "got torch.float32 [1]"),
    "accumulated-rank": ({"accumulated": torch.ones(2, 6)}, "accumulated, visible: expected [batch, groups, n]"),
    "visible-rank": ({"visible": torch.ones(2, 1, 6)}, "got [2, 1, 6], [2, 1, 6]"),
    "visible-tokens": ({"visible": torch.ones(2, 5)}, "got [2, 1, 6], [2, 5]"),
    "visible-batch": ({"visible": torch.ones(1, 6)}, "got [2, 1, 6], [1, 6]"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::select_tokens: ") as raised:
        select_tokens(**({"accumulated": torch.ones(2, 1, 6), "visible": torch.ones(2, 6)} | given_))
    assert message in str(raised.value)
    assert str(raised.value).endswith(".")
