"""token_scores against the float64 model: heads, masks, sizes, dtypes, and what its sums must be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import MASKS
from support.compare_kernels import DTYPES, KERNELS, LARGE, SHAPES, check, compare, exactly, inputs, padding_row
from support.implementations import gpu_only, in_every_dtype, only, triton_only

from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.kernels.token_scores import token_scores


def check_with_the_paper(
    implementation, paper, cases, q, k, mask=None, *, is_causal=True, scale=None, recent_probes=9, random_probes=7,
    groups=1,
):  # fmt: skip
    """Compare scores and visible rows with the model; return what the operator gave."""
    rows = probe_rows(q.shape[2], recent_probes, random_probes, 0)
    given_ = {"mask": mask, "is_causal": is_causal, "scale": scale}
    probes = {"recent_probes": recent_probes, "random_probes": random_probes}
    accumulated, visible = implementation.run(token_scores, q, k, groups=groups, **probes, **given_)
    exact, seen = paper.scores(q, k, rows, groups=groups, **given_)
    # The operator computes in fp32 whatever the inputs are, so plain PyTorch is given fp32 as well.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    additive = mask is not None and mask.is_floating_point()
    shown = mask > torch.finfo(mask.dtype).min if additive else mask
    wide = torch.where(shown, mask, -torch.inf).to(dtype) if additive else mask
    weights = implementation.compute(cases.plain_weights, q.to(dtype), k.to(dtype), wide, is_causal, scale)[:, :, rows]
    plain = weights.sum(2).unflatten(1, (groups, -1)).mean(2)  # [B, groups, n]
    assert accumulated.dtype == visible.dtype == dtype
    cases.assert_as_accurate(accumulated, plain, exact, unit=float(exact.max(initial=0.0)))
    assert np.array_equal(visible.numpy(), seen)
    return accumulated, visible


def check_with_torch(implementation, q, k, mask, *, unit=None, **options):
    """Compare the scores of a kernel with PyTorch, and visible rows exactly; return the scores."""
    got, seen = implementation.run(token_scores, q, k, mask, **options)
    exact, rows = token_scores(*map(exactly, (q, k, mask)), kernel="torch", **options)
    plain, _ = implementation.run(token_scores, q, k, mask, **options | {"kernel": "torch"})
    compare(got, plain, exact, unit=unit or float(exact.max()))
    assert seen.dtype == torch.float32 and torch.equal(seen.double(), rows)
    return got


@pytest.mark.parametrize("heads", ["mha", "gqa4", "gqa7", "mqa"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_head_layout(implementation, paper, cases, heads, mask):
    q, k, _ = cases.qkv(batch=3, heads=heads, n=21, dim=8, dtype=implementation.finest)
    mask_ = cases.mask(mask, 3, q.shape[1], 21, implementation.finest)
    check_with_the_paper(implementation, paper, cases, q, k, mask_, is_causal=mask == "none")


@pytest.mark.parametrize("mask", MASKS)
def test_causal_flag_hides_in_addition_to_the_mask(implementation, paper, cases, mask):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=21, dim=8, dtype=implementation.finest)
    mask_ = cases.mask(mask, 2, 8, 21, implementation.finest)
    check_with_the_paper(implementation, paper, cases, q, k, mask_, is_causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@only("torch")
def test_a_long_prompt_is_scored_in_blocks_of_rows(implementation, paper, cases, monkeypatch, mask, causal):
    monkeypatch.setattr("zipvl_compile.kernels.token_scores_torch.BLOCK_SCORES", 1)  # 8 rows of 4 heads at a time
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=65, dim=8)
    options = {"is_causal": causal, "recent_probes": 9, "random_probes": 21}
    check_with_the_paper(implementation, paper, cases, q, k, cases.mask(mask, 2, 8, 65), **options)


def test_without_mask_and_causality_every_row_sees_every_token(implementation, paper, cases):
    q, k, _ = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    _, visible = check_with_the_paper(implementation, paper, cases, q, k, is_causal=False)
    assert (visible == 16).all()


@pytest.mark.parametrize("n", [1, 2, 63, 129, 500])
@pytest.mark.parametrize("side", ["none", "left-padding"])
@only("torch", "cuda")  # SHAPES has the sizes for the interpreter
def test_every_size_with_the_papers_probes(implementation, paper, cases, n, side):
    q, k, _ = cases.qkv(batch=2, heads="mqa", n=n, dim=16, dtype=implementation.finest)
    mask = cases.mask(side, 2, 4, n)
    check_with_the_paper(implementation, paper, cases, q, k, mask, recent_probes=64, random_probes=64)


@pytest.mark.parametrize("mask", ["none", "left-padding", "additive-min", "per-head-bias"])
@in_every_dtype
def test_every_dtype(implementation, dtype, paper, cases, mask):
    n = 129 if implementation.name != "interpreted" else 40
    q, k, _ = cases.qkv(batch=2, n=n, dim=60, dtype=dtype)
    mask_ = cases.mask(mask, 2, 8, n, dtype)
    check_with_the_paper(implementation, paper, cases, q, k, mask_, recent_probes=n // 6, random_probes=n // 6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@triton_only
def test_every_shape(implementation, shape, dtype):
    q, k, _, mask, is_causal, _ = inputs(shape, dtype)
    on_gpu = implementation.name == "cuda"
    probes = {"recent_probes": 64, "random_probes": 64} if on_gpu else {"recent_probes": 40, "random_probes": 30}
    unit = float(q.shape[2]) if on_gpu else None
    check_with_torch(implementation, q, k, mask, is_causal=is_causal, unit=unit, **probes)


@pytest.mark.parametrize("shape", ["one-kept", "n500"])
@triton_only
def test_padding_row_beside_the_causal_flag(implementation, shape):
    q, k, _, mask, _, _ = inputs(shape, torch.float32)
    probes = {"recent_probes": 64, "random_probes": 64}
    got = check_with_torch(implementation, q, k, padding_row(shape), is_causal=True, **probes)
    whole = implementation.run(token_scores, q, k, mask, is_causal=False, **probes)[0]
    torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_rows_weighed_by_what_they_see(implementation, paper, cases, mask, causal, groups):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=21, dim=8, dtype=implementation.finest)
    mask_ = cases.mask(mask, 2, 8, 21, implementation.finest)
    probes, options = {"recent_probes": 9, "random_probes": 7}, {"is_causal": causal, "groups": groups, "even": True}
    got, seen = implementation.run(token_scores, q, k, mask_, **probes, **options)
    exact, rows = paper.scores(q, k, probe_rows(21, 9, 7, 0), mask=mask_, **options)
    tolerance = 1e-12 if implementation.name == "torch" else 1e-5
    np.testing.assert_allclose(got.numpy(), exact, rtol=tolerance, atol=tolerance)
    assert np.array_equal(seen.numpy(), rows)


def test_even_rows_favour_no_token_where_attention_is_uniform(implementation):
    n = 300
    q, k = torch.zeros(1, 2, n, 8, dtype=implementation.finest), torch.randn(1, 2, n, 8, dtype=implementation.finest)
    accumulated, visible = implementation.run(token_scores, q, k, even=True)
    torch.testing.assert_close((accumulated[0, 0] / visible[0]).double(), torch.full((n,), 1 / n).double())
    accumulated, visible = implementation.run(token_scores, q, k)
    ranks = accumulated[0, 0] / visible[0]
    assert ranks[: n // 4].mean() > 1.5 * ranks[-n // 4 :].mean(), "the score of the paper does"


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.37])
def test_scale_of_the_model(implementation, paper, cases, scale):
    q, k, _ = cases.qkv(n=21, dim=8, dtype=implementation.finest)
    check_with_the_paper(implementation, paper, cases, q, k, scale=scale)


@pytest.mark.parametrize("groups", [1, 2])
def test_softcap_of_the_model(implementation, paper, cases, groups):
    q, k, _ = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    options = {"scale": 0.7, "softcap": 3.0, "groups": groups}
    got = implementation.run(token_scores, q, k, recent_probes=9, random_probes=7, **options)[0]
    exact, _ = paper.scores(q, k, probe_rows(21, 9, 7, 0), **options)
    tolerance = 1e-12 if implementation.name == "torch" else 1e-5
    np.testing.assert_allclose(got.numpy(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2])
@triton_only
def test_softcap_scale_and_groups(implementation, groups):
    q, k, _, mask, is_causal, _ = inputs("additive", torch.float32)
    probes = {"recent_probes": 9, "random_probes": 9}
    options = {"is_causal": is_causal, "scale": 0.7, "softcap": 3.0, "groups": groups}
    check_with_torch(implementation, q, k, mask, **options, **probes)


def test_a_score_per_kv_head(implementation, paper, cases):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=21, dim=8, dtype=implementation.finest)
    per_head, _ = check_with_the_paper(implementation, paper, cases, q, k, groups=2)
    one, _ = implementation.run(token_scores, q, k, recent_probes=9, random_probes=7)
    torch.testing.assert_close(per_head.mean(1, keepdim=True), one)


def test_a_score_per_group_of_neighbouring_kv_heads(implementation, paper, cases):
    q, k, _ = cases.qkv(heads=(8, 4), n=21, dim=8, dtype=implementation.finest)
    check_with_the_paper(implementation, paper, cases, q, k, groups=2)


def test_queries_of_the_probe_rows_only(implementation):
    q, k, _, mask, is_causal, _ = inputs("n500" if implementation.name != "torch" else "additive", torch.float32)
    options = {"is_causal": is_causal, "recent_probes": 12, "random_probes": 8}
    probes = q[:, :, probe_rows(q.shape[2], 12, 8, 0)]
    few, all_ = (implementation.run(token_scores, x, k, mask, **options)[0] for x in (probes, q))
    assert torch.equal(few, all_)


def test_a_sample_of_padding_only_scores_zero(implementation, paper, cases):
    q, k, _ = cases.qkv(batch=3, n=21, dim=8, dtype=implementation.finest)
    mask = cases.mask("left-padding", 3, 8, 21)
    mask[1] = False
    accumulated, visible = check_with_the_paper(implementation, paper, cases, q, k, mask, is_causal=False)
    assert not accumulated[1].any() and not visible[1].any()
    assert accumulated[0].sum() > 0


def test_nan_under_the_mask_does_not_spread(implementation, cases):
    q, k, _ = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    mask = cases.mask("left-padding", 2, 8, 21)
    clean = implementation.run(token_scores, q, k, mask, is_causal=False)
    pad = ~cases.padding(2, 21, "left")
    k = k.masked_fill(pad[:, None, :, None], float("nan"))
    dirty = implementation.run(token_scores, q, k, mask, is_causal=False)
    torch.testing.assert_close(dirty, clean)


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)], ids=["no-sample", "no-token"])
def test_empty_inputs_give_empty_scores(implementation, batch, n):
    given_ = torch.ones(batch, 4, n, 8), torch.ones(batch, 2, n, 8)
    accumulated, visible = implementation.run(token_scores, *given_)
    assert accumulated.shape == (batch, 1, n) and visible.shape == (batch, n)


def test_inputs_stay_as_they_are(implementation, cases):
    q, k, _ = cases.qkv(n=21, dim=8, dtype=implementation.finest)
    given_ = implementation.given(q, k, cases.mask("per-head-bias", 1, 8, 21, implementation.finest))
    copies = [x.clone() for x in given_]
    token_scores(*given_, kernel=implementation.kernel)
    assert all(torch.equal(x, copy) for x, copy in zip(given_, copies, strict=True))


def test_strided_inputs_give_the_same_scores(implementation, cases):
    q, k, _ = cases.qkv(n=21, dim=8, dtype=implementation.finest)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    head_last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k)]  # elements of a head apart
    expected = implementation.run(token_scores, q, k)
    for strided in (token_major, head_last):
        got = implementation.run(token_scores, *strided)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@triton_only
def test_strides_of_a_masked_prompt(implementation):
    q, k, _, mask, is_causal, _ = inputs("all-kept", torch.float32)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    head_last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k)]
    expected, *others = (
        implementation.run(token_scores, *x, mask, is_causal=is_causal)[0] for x in ((q, k), token_major, head_last)
    )
    assert all(torch.equal(other, expected) for other in others)


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


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 90), heads=st.sampled_from(["mha", "gqa4", "gqa7"]), dim=st.integers(1, 33),
       batch=st.integers(1, 3), probes=st.integers(1, 40), seed=st.integers(0, 99))  # fmt: skip
@triton_only
def test_rows_give_away_all_their_attention(implementation, cases, n, heads, dim, batch, probes, seed):
    q, k, _ = cases.qkv(batch=batch, heads=heads, n=n, dim=dim, dtype=torch.float32, seed=seed)
    rows = {"recent_probes": probes // 2, "random_probes": probes - probes // 2}
    scores = check_with_torch(implementation, q, k, None, **rows)
    torch.testing.assert_close(scores.sum(-1), torch.full((batch, 1), float(min(n, probes))), rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_order_of_heads_inside_a_group_does_not_matter(cases, order, seed):
    q, k, _ = cases.qkv(batch=2, heads="gqa4", n=17, dim=4, seed=seed)
    shuffled = q.unflatten(1, (2, 4))[:, :, list(order)].flatten(1, 2)
    torch.testing.assert_close(token_scores(shuffled, k), token_scores(q, k), rtol=1e-12, atol=1e-12)


def test_samples_do_not_influence_each_other(implementation, cases):
    q, k, _ = cases.qkv(batch=3, n=21, dim=8, dtype=implementation.finest)
    together = implementation.run(token_scores, q, k)
    q, k = q.clone(), k.clone()
    q[1:], k[1:] = float("nan"), 7.0
    alone = implementation.run(token_scores, q, k)
    assert torch.equal(together[0][0], alone[0][0]) and torch.equal(together[1][0], alone[1][0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
@gpu_only
def test_a_large_prompt(implementation, cases, name, dtype, kernel):
    batch, heads, n, dim, padded = LARGE[name]
    q, k, _ = cases.qkv(batch=batch, heads=heads, n=n, dim=dim, dtype=dtype)
    row = cases.padding(batch, n, "left")[:, None, None] if padded else None
    unit = float(n if padded else 128)
    check(implementation, lambda *x, **o: token_scores(*x, **o)[0], q, k, row, is_causal=True, kernel=kernel, unit=unit)


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
