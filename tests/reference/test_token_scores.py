"""token_scores against the float64 model: heads, masks, sizes, dtypes, and what its sums must be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import MASKS

from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.kernels.token_scores import token_scores


def check(paper, cases, q, k, mask=None, is_causal=True, scale=None, recent_probes=9, random_probes=7, groups=1):
    """Compare scores of both dtypes of result with the model; return what the operator gave."""
    rows = probe_rows(q.shape[2], recent_probes, random_probes, 0)
    given_ = {"mask": mask, "is_causal": is_causal, "scale": scale}
    probes = {"recent_probes": recent_probes, "random_probes": random_probes}
    accumulated, visible = token_scores(q, k, groups=groups, **probes, **given_)
    exact, seen = paper.scores(q, k, rows, groups=groups, **given_)
    # The operator computes in fp32 whatever the inputs are, so plain PyTorch is given fp32 as well.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    additive = mask is not None and mask.is_floating_point()
    shown = mask > torch.finfo(mask.dtype).min if additive else mask
    wide = torch.where(shown, mask, -torch.inf).to(dtype) if additive else mask
    weights = cases.plain_weights(q.to(dtype), k.to(dtype), wide, is_causal, scale)[:, :, rows]
    plain = weights.sum(2).unflatten(1, (groups, -1)).mean(2)  # [B, groups, n]
    assert accumulated.dtype == visible.dtype == dtype
    cases.assert_as_accurate(accumulated, plain, exact, unit=float(exact.max(initial=0.0)))
    assert np.array_equal(visible.numpy(), seen)
    return accumulated, visible


@pytest.mark.parametrize("heads", ["mha", "gqa4", "gqa7", "mqa"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_head_layout(paper, cases, heads, mask):
    q, k, _ = cases.qkv(batch=3, heads=heads, n=21, dim=8)
    check(paper, cases, q, k, cases.mask(mask, 3, q.shape[1], 21), is_causal=mask == "none")


@pytest.mark.parametrize("mask", MASKS)
def test_causal_flag_hides_in_addition_to_the_mask(paper, cases, mask):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=21, dim=8)
    check(paper, cases, q, k, cases.mask(mask, 2, 8, 21), is_causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_a_long_prompt_is_scored_in_blocks_of_rows(paper, cases, monkeypatch, mask, causal):
    monkeypatch.setattr("zipvl_compile.kernels.token_scores_torch.BLOCK_SCORES", 1)  # 8 rows of 4 heads at a time
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=65, dim=8)
    check(paper, cases, q, k, cases.mask(mask, 2, 8, 65), is_causal=causal, recent_probes=9, random_probes=21)


def test_without_mask_and_causality_every_row_sees_every_token(paper, cases):
    q, k, _ = cases.qkv(batch=2, n=21, dim=8)
    _, visible = check(paper, cases, q, k, is_causal=False)
    assert (visible == 16).all()


@pytest.mark.parametrize("n", [1, 2, 63, 129, 500])
@pytest.mark.parametrize("side", ["none", "left-padding"])
def test_every_size_with_the_papers_probes(paper, cases, n, side):
    q, k, _ = cases.qkv(batch=2, heads="mqa", n=n, dim=16)
    check(paper, cases, q, k, cases.mask(side, 2, 4, n), recent_probes=64, random_probes=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "left-padding", "additive-min", "per-head-bias"])
def test_every_dtype(paper, cases, dtype, mask):
    q, k, _ = cases.qkv(batch=2, n=129, dim=60, dtype=dtype)
    check(paper, cases, q, k, cases.mask(mask, 2, 8, 129, dtype), recent_probes=20, random_probes=20)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.37])
def test_scale_of_the_model(paper, cases, scale):
    q, k, _ = cases.qkv(n=21, dim=8)
    check(paper, cases, q, k, scale=scale)


def test_a_score_per_kv_head(paper, cases):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=21, dim=8)
    per_head, _ = check(paper, cases, q, k, groups=2)
    one, _ = token_scores(q, k, recent_probes=9, random_probes=7)
    torch.testing.assert_close(per_head.mean(1, keepdim=True), one)


def test_a_score_per_group_of_neighbouring_kv_heads(paper, cases):
    q, k, _ = cases.qkv(heads=(8, 4), n=21, dim=8)
    check(paper, cases, q, k, groups=2)


def test_a_sample_of_padding_only_scores_zero(paper, cases):
    q, k, _ = cases.qkv(batch=3, n=21, dim=8)
    mask = cases.mask("left-padding", 3, 8, 21)
    mask[1] = False
    accumulated, visible = check(paper, cases, q, k, mask, is_causal=False)
    assert not accumulated[1].any() and not visible[1].any()
    assert accumulated[0].sum() > 0


def test_nan_under_the_mask_does_not_spread(paper, cases):
    q, k, _ = cases.qkv(batch=2, n=21, dim=8)
    mask = cases.mask("left-padding", 2, 8, 21)
    clean = token_scores(q, k, mask, is_causal=False)
    pad = ~cases.padding(2, 21, "left")
    k = k.masked_fill(pad[:, None, :, None], float("nan"))
    dirty = token_scores(q, k, mask, is_causal=False)
    torch.testing.assert_close(dirty, clean)


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)], ids=["no-sample", "no-token"])
def test_empty_inputs_give_empty_scores(batch, n):
    accumulated, visible = token_scores(torch.ones(batch, 4, n, 8), torch.ones(batch, 2, n, 8))
    assert accumulated.shape == (batch, 1, n) and visible.shape == (batch, n)


def test_inputs_stay_as_they_are(cases):
    q, k, _ = cases.qkv(n=21, dim=8)
    mask = cases.mask("per-head-bias", 1, 8, 21)
    copies = [x.clone() for x in (q, k, mask)]
    token_scores(q, k, mask)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, mask), copies, strict=True))


def test_strided_inputs_give_the_same_scores(cases):
    q, k, _ = cases.qkv(n=21, dim=8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    torch.testing.assert_close(token_scores(*strided), token_scores(q, k), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 40),
    recent_probes=st.integers(0, 12),
    random_probes=st.integers(1, 12),
    side=st.sampled_from(["none", "left-padding", "right-padding", "additive-inf"]),
    seed=st.integers(0, 99),
)
def test_accumulated_sums_to_the_valid_probe_rows(cases, batch, n, recent_probes, random_probes, side, seed):
    q, k, _ = cases.qkv(batch=batch, heads="mqa", n=n, dim=4, seed=seed)
    mask = cases.mask(side, batch, 4, n)
    accumulated, visible = token_scores(q, k, mask, recent_probes=recent_probes, random_probes=random_probes, seed=seed)
    rows = probe_rows(n, recent_probes, random_probes, seed)
    real = torch.ones(batch, n, dtype=torch.bool)
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask == 0
        real = shown.any(-1)[:, 0].expand(batch, n)
    torch.testing.assert_close(accumulated.sum(2)[:, 0], real[:, rows].sum(1).double(), rtol=1e-10, atol=1e-10)
    assert (accumulated >= 0).all() and (accumulated[:, 0] <= visible * (1 + 1e-12)).all()


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_order_of_heads_inside_a_group_does_not_matter(cases, order, seed):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=17, dim=4, seed=seed)
    shuffled = q.unflatten(1, (2, 4))[:, :, list(order)].flatten(1, 2)
    torch.testing.assert_close(token_scores(shuffled, k), token_scores(q, k), rtol=1e-12, atol=1e-12)


def test_samples_do_not_influence_each_other(cases):
    q, k, _ = cases.qkv(batch=3, n=21, dim=8)
    together = token_scores(q, k)
    q, k = q.clone(), k.clone()
    q[1:], k[1:] = float("nan"), 7.0
    alone = token_scores(q, k)
    assert torch.equal(together[0][0], alone[0][0]) and torch.equal(together[1][0], alone[1][0])


Q, K = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 6, 8)
BAD = {
    "q-rank": ({"q": Q[0]}, "q: expected a [batch, heads, tokens, head_dim] tensor, got [4, 6, 8]"),
    "q-integer": ({"q": Q.int()}, "q: expected a floating-point dtype, got torch.int32"),
    "k-rank": ({"k": K[0]}, "k: expected a [batch, heads, tokens, head_dim] tensor"),
    "k-batch": ({"k": K[:1]}, "k: expected batch 2, like q, got 1"),
    "k-dtype": ({"k": K.half()}, "k: expected dtype torch.float32, like q, got torch.float16"),
    "k-width": ({"k": K[..., :4]}, "k: expected head_dim 8, like q, got 4"),
    "k-heads": ({"k": K[:, :1].expand(2, 3, 6, 8)}, "k: expected a head count that divides q's 4, got 3"),
    "k-tokens": ({"k": K[:, :, :5]}, "q: expected 5 tokens, like k, or the 5 probe rows, got 6"),
    "mask-rank": ({"mask": torch.ones(6, 6).bool()}, "mask: expected a [batch, heads, queries, keys] tensor"),
    "mask-integer": ({"mask": torch.ones(1, 1, 6, 6).int()}, "mask: expected bool (True = visible) or an additive"),
    "mask-keys": ({"mask": torch.ones(1, 1, 6, 5).bool()}, "mask: expected a shape that broadcasts to [2, 4, 6, 6]"),
    "mask-rows": ({"mask": torch.ones(1, 1, 3, 6).bool()}, "mask: expected a shape that broadcasts to [2, 4, 6, 6]"),
    "mask-heads": ({"mask": torch.ones(1, 2, 6, 6).bool()}, "got [1, 2, 6, 6]"),
    "groups": ({"groups": 3}, "groups: expected a divisor of 2 KV heads, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::token_scores: ") as raised:
        token_scores(**({"q": Q, "k": K} | given_))
    assert message in str(raised.value)
    assert str(raised.value).endswith("."), "the remedy is a sentence"
