"""What tokens rank by: each kind written out in NumPy, and the tokens that a graph keeps by it."""

import numpy as np
import pytest
import torch

from zipvl_compile.kernels.probe_rows import STRIDED, probe_rows, shuffled_order
from zipvl_compile.passes.policy import EVERY_ROW
from zipvl_compile.passes.prefill.ranking import insert
from zipvl_compile.passes.settings import Settings

N, PROBES = 20, {"recent_probes": 6, "random_probes": 6, "seed": 3}
RATIO = {"keep_ratio": 0.3, "min_tokens": 0}


def by_hand(kind, accumulated, visible, v, seed):
    """Return the ranking `[B, 1, n]` of a kind."""
    average = accumulated / np.maximum(visible, 1)[:, None]
    shown = (visible > 0)[:, None]
    if kind == "accumulated":
        return accumulated
    if kind == "value":
        return average * np.sqrt((v**2).sum(-1)).mean(1, keepdims=True)
    if kind == "recent":
        return (np.arange(visible.shape[1]) + 1) * shown
    if kind == "random":
        return (shuffled_order(torch.arange(visible.shape[1]), seed).numpy() + 1.0) * shown
    return average


def smoothed(ranking, width):
    """Return the mean of `width` neighbours, of zeros beyond the ends."""
    half = width // 2
    padded = np.pad(ranking, ((0, 0), (0, 0), (half, half)))
    return sum(padded[..., i : i + ranking.shape[2]] for i in range(width)) / width


def left_padding():
    mask = torch.ones(N, N, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :7] = False
    return mask


@pytest.mark.parametrize("pooling", [1, 5])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padding"])
@pytest.mark.parametrize("score", ["normalised", "accumulated", "even", "value", "recent", "random"])
def test_the_tokens_that_rank_highest_are_kept(record, modules, paper, score, padded, pooling):
    q, k, v = modules.qkv(seed=4)
    mask = left_padding() if padded else None
    rule = RATIO | {"score": score, "pooling": pooling}
    (*_, kept), _ = record(modules.Prefill(is_causal=mask is None), q, k, v, mask, **rule)
    rows = probe_rows(N, *PROBES.values())
    accumulated, visible = paper.scores(q, k, rows, mask=mask, is_causal=mask is None, even=score == "even")
    ranking = by_hand(score, accumulated, visible, v.numpy(), PROBES["seed"])
    if pooling > 1:
        ranking = smoothed(ranking, pooling) * (visible > 0)[:, None]
    expected = paper.selection(accumulated, visible, keep_ratio=0.3, ranking=ranking)
    assert np.array_equal(kept.numpy(), expected)
    assert (expected[0] >= 7 * padded).all(), "padding comes last"
    usual = paper.selection(*paper.scores(q, k, rows, mask=mask, is_causal=mask is None), keep_ratio=0.3)
    assert score == "normalised" or not np.array_equal(expected, usual), "the kind must matter in this case"


@pytest.mark.parametrize(
    "probes",
    [{"draw": "strided"}, {"recent_probes": EVERY_ROW, "random_probes": 0}, {"recent_probes": 1, "random_probes": 0}],
    ids=str,
)
def test_probe_rows_of_every_kind_reach_the_operators(record, modules, paper, probes):
    q, k, v = modules.qkv(seed=5)
    (*_, kept), _ = record(modules.Prefill(is_causal=True), q, k, v, **RATIO, **probes)
    chosen = Settings(**PROBES | probes)
    rows = probe_rows(N, chosen.recent_probes, chosen.random_probes, STRIDED if "draw" in probes else chosen.seed)
    scores = paper.scores(q, k, rows)
    assert np.array_equal(kept.numpy(), paper.selection(*scores, keep_ratio=0.3))
    usual = paper.selection(*paper.scores(q, k, probe_rows(N, *PROBES.values())), keep_ratio=0.3)
    assert not np.array_equal(kept.numpy(), usual), "the rows must matter in this case"


def test_a_drawn_order_is_a_fair_one():
    order = shuffled_order(torch.arange(10_000), 0)
    assert order.unique().numel() == 10_000 and int(order.min()) >= 0
    assert not torch.equal(order, shuffled_order(torch.arange(10_000), 1))
    best = order.argsort()[-2000:]
    parts = torch.histc(best.double(), bins=10, min=0, max=10_000)
    assert parts.min() > 140 and parts.max() < 260, "about 200 of each tenth"


def test_the_rule_of_the_paper_ranks_in_the_operator():
    assert insert(None, None, None, None, Settings(), None) is None
