"""sparse_attention against the float64 model, which attends with full-length keys, one query at a time."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import MASKS

from zipvl_compile.cache.compact_layer import spare_tokens
from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.sparse_attention_torch import attend_cudnn, plan_length


def choose(batch, groups, n, p, seed=0):
    """Return p ascending positions per sample and group, the newest always among them."""
    draw = torch.rand(batch, groups, n, generator=torch.Generator().manual_seed(seed))
    draw[..., -1] = 2
    return draw.argsort(-1, descending=True)[..., :p].sort(-1).values


def check(paper, cases, q, k, v, positions, mask=None, is_causal=True, scale=None, queries="selected"):
    """Compare with the model, and the error with that of plain PyTorch over the same keys; return the result."""
    options = {"mask": mask, "is_causal": is_causal, "scale": scale}
    keys, values = gather_tokens(k, positions), gather_tokens(v, positions)
    out = sparse_attention(q, keys, values, positions, queries=queries, **options)
    exact = torch.from_numpy(paper.attention(q, k, v, positions, queries=queries, **options))
    # Plain PyTorch: dense attention with all other keys hidden.
    batch, heads, n, _ = q.shape
    kept = torch.zeros(batch, positions.shape[1], n, dtype=torch.bool).scatter_(2, positions, True)
    kept = kept.repeat_interleave(heads // positions.shape[1], 1)
    shown = kept[:, :, None].expand(-1, -1, n, -1)
    if mask is not None and mask.dtype == torch.bool:
        shown = shown & mask
    elif mask is not None:
        shown = shown & (mask > torch.finfo(mask.dtype).min)
    if is_causal:
        shown = shown.tril()
    bias = shown
    if mask is not None and mask.is_floating_point():
        bias = torch.where(shown, mask, -torch.inf).to(q.dtype)
    answered = shown.any(-1, keepdim=True) & (kept[..., None] | torch.tensor(queries == "all"))
    plain = cases.plain_attention(q, k, v, bias, False, scale).masked_fill(~answered, 0.0)
    cases.assert_as_accurate(out, plain, exact, where=answered)
    assert out.isfinite().all(), "also the rows that see nothing"
    skipped = ~kept & torch.tensor(queries == "selected")
    assert not out[skipped].any(), "an unselected query has no attention output"
    if mask is None or mask.dtype == torch.bool or not mask.isfinite().all():
        assert not out[~answered.squeeze(-1)].any(), "a query that sees no kept key has no attention output"
    return out


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("heads", ["mha", "gqa4", "gqa7", "mqa"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_head_layout(paper, cases, mask, heads, queries):
    q, k, v = cases.qkv(batch=3, heads=heads, n=21, dim=8, value_dim=6)
    mask_ = cases.mask(mask, 3, q.shape[1], 21)
    check(paper, cases, q, k, v, choose(3, 1, 21, 9), mask_, is_causal=mask == "none", queries=queries)


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("mask", MASKS)
def test_causal_flag_hides_in_addition_to_the_mask(paper, cases, mask, queries):
    q, k, v = cases.qkv(batch=2, n=21, dim=8)
    mask_ = cases.mask(mask, 2, 8, 21)
    check(paper, cases, q, k, v, choose(2, 1, 21, 9), mask_, is_causal=True, queries=queries)


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("p", [1, 5, 21])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_from_one_kept_token_to_all(paper, cases, p, is_causal, queries):
    q, k, v = cases.qkv(batch=2, n=21, dim=8)
    check(paper, cases, q, k, v, choose(2, 1, 21, p), is_causal=is_causal, queries=queries)


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("n", [1, 2, 63, 129, 500])
@pytest.mark.parametrize("side", ["none", "left-padding"])
def test_every_size(paper, cases, n, side, queries):
    q, k, v = cases.qkv(batch=2, heads="mqa", n=n, dim=16, value_dim=24)
    positions = choose(2, 1, n, max(1, n // 3))
    mask = cases.mask(side, 2, 4, n)
    check(paper, cases, q, k, v, positions, mask, is_causal=side == "none", queries=queries)


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "left-padding", "additive-min", "per-head-bias"])
def test_every_dtype(paper, cases, mask, dtype, queries):
    q, k, v = cases.qkv(batch=2, n=63, dim=60, dtype=dtype)
    mask_ = cases.mask(mask, 2, 8, 63, dtype)
    out = check(paper, cases, q, k, v, choose(2, 1, 63, 30), mask_, is_causal=mask == "none", queries=queries)
    assert out.dtype == dtype


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.37])
def test_scale_of_the_model(paper, cases, scale):
    q, k, v = cases.qkv(n=21, dim=8)
    check(paper, cases, q, k, v, choose(1, 1, 21, 9), scale=scale)


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("mask", ["none", "left-padding", "per-head-window"])
def test_positions_per_kv_head(paper, cases, mask, queries):
    q, k, v = cases.qkv(batch=2, heads="gqa4", n=21, dim=8)
    mask_ = cases.mask(mask, 2, 8, 21)
    check(paper, cases, q, k, v, choose(2, 2, 21, 9), mask_, is_causal=mask == "none", queries=queries)


@pytest.mark.parametrize("mask", ["left-padding", "additive-inf", "additive-min"])
@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("p", [4, 21])
def test_a_sample_of_padding_only_gives_finite_rows_and_zero_under_a_hard_mask(cases, mask, queries, p):
    q, k, v = cases.qkv(batch=3, n=21, dim=8)
    mask_ = cases.mask(mask, 3, 8, 21)
    mask_[1] = False if mask_.dtype == torch.bool else mask_.min()
    positions = choose(3, 1, 21, p)
    keys, values = gather_tokens(k, positions), gather_tokens(v, positions)
    out = sparse_attention(q, keys, values, positions, mask_, is_causal=False, queries=queries)
    assert out.isfinite().all()
    # finfo.min is a number: softmax over such a row is uniform, in dense attention too.
    if mask != "additive-min":
        assert not out[1].any()
    assert out[0].any()


@pytest.mark.parametrize("mask", MASKS)
def test_all_tokens_kept_is_dense_attention(cases, mask):
    q, k, v = cases.qkv(batch=3, n=21, dim=8)
    positions = torch.arange(21).repeat(3, 1, 1)
    mask_ = cases.mask(mask, 3, 8, 21)
    out = sparse_attention(q, k, v, positions, mask_, is_causal=mask == "none")
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_, is_causal=mask == "none", enable_gqa=True
    )
    assert torch.equal(out, dense), "bit for bit: tau = 1 must give the tokens of the original model"


def test_nan_rows_are_those_of_dense_attention(cases):
    q, k, v = cases.qkv(batch=2, n=21, dim=8)
    q[0, 3, 5], k[1, 0, 7] = float("nan"), float("inf")
    out = sparse_attention(q, k, v, torch.arange(21).repeat(2, 1, 1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert dense.isnan().any() and not dense.isnan().all()
    torch.testing.assert_close(out, dense, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("mask", ["none", "left-padding"])
def test_spare_rows_are_never_read(cases, mask, queries):
    q, k, v = cases.qkv(batch=2, n=21, dim=8)
    positions, mask_ = choose(2, 1, 21, 9), cases.mask(mask, 2, 8, 21)
    options = {"mask": mask_, "is_causal": mask == "none", "queries": queries}
    clean = sparse_attention(q, gather_tokens(k, positions), gather_tokens(v, positions), positions, **options)
    keys, values = gather_tokens(k, positions, 5), gather_tokens(v, positions, 5)
    keys[:, :, 9:], values[:, :, 9:] = float("nan"), float("nan")
    assert torch.equal(sparse_attention(q, keys, values, positions, **options), clean)


def test_output_is_token_major_so_that_the_models_transpose_copies_nothing(cases):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, value_dim=6)
    for positions in (choose(2, 1, 21, 9), choose(2, 1, 21, 21)):
        out = sparse_attention(q, gather_tokens(k, positions), gather_tokens(v, positions), positions)
        assert out.transpose(1, 2).is_contiguous()


def test_inputs_stay_as_they_are(cases):
    q, k, v = cases.qkv(n=21, dim=8)
    mask, positions = cases.mask("per-head-bias", 1, 8, 21), choose(1, 1, 21, 9)
    inputs = [q, gather_tokens(k, positions), gather_tokens(v, positions), positions, mask]
    copies = [x.clone() for x in inputs]
    for queries in ("selected", "all"):
        sparse_attention(*inputs, queries=queries)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_empty_batch():
    out = sparse_attention(
        torch.ones(0, 4, 6, 8), torch.ones(0, 2, 3, 8), torch.ones(0, 2, 3, 5), torch.zeros(0, 1, 3, dtype=torch.int64)
    )
    assert out.shape == (0, 4, 6, 5)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 30), share=st.floats(0.05, 1.0), seed=st.integers(0, 99),
       queries=st.sampled_from(["selected", "all"]))  # fmt: skip
def test_constant_values_come_out_unchanged(cases, n, share, seed, queries):
    q, k, _ = cases.qkv(batch=2, n=n, dim=4, seed=seed)
    positions = choose(2, 1, n, max(1, int(share * n)), seed)
    keys, values = gather_tokens(k, positions), torch.ones(2, 2, positions.shape[2], 3, dtype=torch.float64)
    out = sparse_attention(q, keys, values, positions, queries=queries)
    if queries == "all":  # weights sum to one wherever a kept key is visible
        answered = torch.arange(n) >= positions[:, :, :1].squeeze(1)
    else:
        answered = torch.zeros(2, n, dtype=torch.bool).scatter_(1, positions[:, 0], True)
    expected = answered[:, None, :, None].double().expand_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99))
def test_samples_do_not_influence_each_other(cases, seed):
    q, k, v = cases.qkv(batch=3, n=17, dim=4, seed=seed)
    positions = choose(3, 1, 17, 6, seed)
    together = sparse_attention(q, gather_tokens(k, positions), gather_tokens(v, positions), positions)
    q[1:], k[1:], v[1:] = 5.0, float("nan"), float("inf")
    alone = sparse_attention(q, gather_tokens(k, positions), gather_tokens(v, positions), positions)
    assert torch.equal(together[0], alone[0])


Q, K, V = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 5)
P = torch.arange(3).repeat(2, 1, 1)
BAD = {
    "q-integer": ({"q": Q.int()}, "q: expected a floating-point dtype, got torch.int32"),
    "k-batch": ({"k": K[:1]}, "k: expected batch 2, like q, got 1"),
    "k-dtype": ({"k": K.double()}, "k: expected dtype torch.float32, like q, got torch.float64"),
    "k-width": ({"k": K[..., :4]}, "k: expected head_dim 8, like q, got 4"),
    "k-rows": ({"k": K[:, :, :2]}, "k, v: expected at least 3 kept tokens, got 2"),
    "k-heads": (
        {"k": K[:, :1].expand(2, 3, 3, 8), "v": V[:, :1].expand(2, 3, 3, 5)},
        "k: expected a head count that divides q's 4, got 3",
    ),
    "v-heads": ({"v": V[:, :1]}, "v: expected heads and tokens [2, 3], like k, got [1, 3]"),
    "v-rows": ({"v": V[:, :, :2]}, "k, v: expected at least 3 kept tokens, got 2"),
    "v-dtype": ({"v": V.half()}, "v: expected dtype torch.float32, like q, got torch.float16"),
    "positions-rank": ({"positions": P[0]}, "positions: expected an int64 [batch, groups, kept] tensor"),
    "positions-batch": ({"positions": P[:1]}, "positions: expected batch 2"),
    "mask-rank": ({"mask": torch.ones(6, 6).bool()}, "mask: expected a [batch, heads, queries, keys] tensor"),
    "mask-kept": ({"mask": torch.ones(2, 1, 3, 3).bool()}, "mask: expected a shape that broadcasts to [2, 4, 6, 6]"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::sparse_attention: ") as raised:
        sparse_attention(**({"q": Q, "k": K, "v": V, "positions": P} | given_))
    assert message in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize("p", [1, 31, 32, 33, 100, 4095, 4096, 4097, 6012, 40_000])
def test_lengths_of_a_plan_are_few_and_near(p):
    length = plan_length(p)
    assert p <= length <= p + max(p // 16, 1) and plan_length(length) == length
    assert length - p <= spare_tokens(p), "a cache has as many spare rows"
    octave = range(2**12, 2**13)
    assert len({plan_length(other) for other in octave}) == 17


@pytest.mark.parametrize("narrow", [False, True], ids=["all queries", "kept queries"])
@pytest.mark.parametrize("spare", [0, 2, 9], ids=["no room", "some room", "room"])
def test_rows_up_to_the_length_of_a_plan_have_no_effect(cases, monkeypatch, narrow, spare):
    # The backend that this is for needs a GPU, where tests/gpu runs it; what surrounds it does not.
    monkeypatch.setattr("zipvl_compile.kernels.sparse_attention_torch.sdpa_kernel", lambda backend: nullcontext())
    q, k, v = cases.qkv(batch=2, n=150, value_dim=12)
    positions = torch.stack([torch.randperm(150)[:100].sort().values for _ in range(2)])[:, None]
    keys, values = gather_tokens(k, positions, spare), gather_tokens(v, positions, spare)
    keys[:, :, 100:] = float("nan")
    if narrow:
        q = gather_tokens(q, positions)
    got = attend_cudnn(q, keys, values, positions, 0.4)
    torch.testing.assert_close(got, sparse_attention(q, keys, values, positions, scale=0.4))
    assert got.stride() == sparse_attention(q, keys, values, positions).stride()
