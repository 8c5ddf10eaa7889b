"""sparse_attention against the float64 model, which attends with full-length keys, one query at a time."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cases as shared_cases
from support import compare_kernels
from support.cases import MASKS
from support.compare_kernels import DTYPES, KERNELS, LARGE, SHAPES, inputs, padding_row
from support.implementations import gpu_only, in_every_dtype, in_every_layout, only, triton_only

from zipvl_compile.kernels.common import autotune
from zipvl_compile.kernels.common.masks import take, visible
from zipvl_compile.kernels.gather_tokens import gather_kv, gather_tokens
from zipvl_compile.kernels.sparse_attention import _attend_triton, sparse_attention, tilings

choose = functools.partial(shared_cases.choose, newest=True)  # as select_tokens does
both_kinds_of_queries = pytest.mark.parametrize("queries", ["selected", "all"])


def spared(x, positions):
    """Return the kept tokens as a cache holds them: rows that nobody wrote after them."""
    out = gather_tokens(x, positions, 4)
    out[:, :, positions.shape[2] :] = float("nan")
    return out


def check(
    implementation, paper, cases, q, k, v, positions, mask=None, *, is_causal=True, scale=None, queries="selected"
):  # fmt: skip
    """Compare with the model, and the error with that of plain PyTorch over the same keys; return the result."""
    options = {"mask": mask, "is_causal": is_causal, "scale": scale}
    kept_kv = spared(k, positions), spared(v, positions)
    out = implementation.run(sparse_attention, q, *kept_kv, positions, queries=queries, **options)
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
    plain = implementation.compute(cases.plain_attention, q, k, v, bias, False, scale).masked_fill(~answered, 0.0)
    cases.assert_as_accurate(out, plain, exact, where=answered)
    assert out.isfinite().all(), "also the rows that see nothing"
    skipped = ~kept & torch.tensor(queries == "selected")
    assert not out[skipped].any(), "an unselected query has no attention output"
    if mask is None or mask.dtype == torch.bool or not mask.isfinite().all():
        assert not out[~answered.squeeze(-1)].any(), "a query that sees no kept key has no attention output"
    return out


def answered(q, positions, mask, is_causal, queries):
    """Return which queries see a kept key: bool `[B, Hq, n, 1]`."""
    batch, heads, n, _ = q.shape
    where = positions.repeat_interleave(heads // positions.shape[1], 1)
    shown = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else visible(mask)
    shown = take(shown.expand(-1, -1, n, n), batch, None, where)
    if is_causal:
        shown = shown & (where.unsqueeze(2) <= torch.arange(n)[:, None])
    seen = shown.any(-1, keepdim=True)
    return seen if queries == "all" else seen & torch.zeros_like(seen).scatter_(2, where.unsqueeze(3), True)


def check_with_torch(implementation, q, k, v, positions, mask, is_causal, queries, **options):
    """Compare a kernel with PyTorch, also in the rows that get zeros; return its result."""
    where = answered(q, positions, mask, is_causal, queries)
    options |= {"is_causal": is_causal, "queries": queries, "where": where}
    given_ = (q, spared(k, positions), spared(v, positions), positions, mask)
    return compare_kernels.check(implementation, sparse_attention, *given_, **options)


@pytest.mark.parametrize("groups", ["layer", "kv_head"])
@pytest.mark.parametrize("p", [1, 2, 9, 20, 21])
@pytest.mark.parametrize("mask", ["none", "left-padding", "per-head-window", "additive-inf"])
def test_rows_that_are_held(implementation, paper, cases, mask, p, groups):
    """Each row is that of the kept token before it: of the outputs of the kept tokens, to the bit."""
    q, k, v = cases.qkv(batch=2, heads="gqa4", n=21, dim=8, dtype=implementation.finest)
    mask_ = cases.mask(mask, 2, q.shape[1], 21, implementation.finest)
    positions = choose(2, 1 if groups == "layer" else k.shape[1], 21, p)
    kept_kv, options = (spared(k, positions), spared(v, positions)), {"mask": mask_, "is_causal": mask == "none"}
    held, own = (
        implementation.run(sparse_attention, q, *kept_kv, positions, queries=queries, **options)
        for queries in ("hold", "selected")
    )
    exact = paper.attention(q, k, v, positions, queries="hold", **options)
    tolerance = 1e-12 if implementation.finest == torch.float64 else 1e-5
    torch.testing.assert_close(held.double(), torch.from_numpy(exact), rtol=tolerance, atol=tolerance)
    for b in range(2):
        for h in range(q.shape[1]):
            kept = positions[b, h * positions.shape[1] // q.shape[1]]
            before = (torch.searchsorted(kept, torch.arange(21), right=True) - 1).clamp(min=0)
            assert torch.equal(held[b, h], own[b, h, kept[before]])


@both_kinds_of_queries
@pytest.mark.parametrize("mask", MASKS)
@in_every_layout
def test_every_mask_and_head_layout(implementation, heads, paper, cases, mask, queries):
    q, k, v = cases.qkv(batch=3, heads=heads, n=21, dim=8, value_dim=6, dtype=implementation.finest)
    positions, mask_ = choose(3, 1, 21, 9), cases.mask(mask, 3, q.shape[1], 21, implementation.finest)
    check(implementation, paper, cases, q, k, v, positions, mask_, is_causal=mask == "none", queries=queries)


@both_kinds_of_queries
@pytest.mark.parametrize("mask", MASKS)
def test_causal_flag_hides_in_addition_to_the_mask(implementation, paper, cases, mask, queries):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    positions, mask_ = choose(2, 1, 21, 9), cases.mask(mask, 2, 8, 21, implementation.finest)
    check(implementation, paper, cases, q, k, v, positions, mask_, is_causal=True, queries=queries)


@both_kinds_of_queries
@pytest.mark.parametrize("p", [1, 5, 21])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_from_one_kept_token_to_all(implementation, paper, cases, p, is_causal, queries):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    check(implementation, paper, cases, q, k, v, choose(2, 1, 21, p), is_causal=is_causal, queries=queries)


@both_kinds_of_queries
@pytest.mark.parametrize("n", [1, 2, 63, 129, 500])
@pytest.mark.parametrize("side", ["none", "left-padding"])
def test_every_size(implementation, paper, cases, n, side, queries):
    q, k, v = cases.qkv(batch=2, heads="mqa", n=n, dim=16, value_dim=24, dtype=implementation.finest)
    positions = choose(2, 1, n, max(1, n // 3))
    mask = cases.mask(side, 2, 4, n)
    check(implementation, paper, cases, q, k, v, positions, mask, is_causal=side == "none", queries=queries)


@both_kinds_of_queries
@pytest.mark.parametrize("mask", ["none", "left-padding", "additive-min", "per-head-bias"])
@in_every_dtype
def test_every_dtype(implementation, dtype, paper, cases, mask, queries):
    q, k, v = cases.qkv(batch=2, n=63, dim=60, dtype=dtype)
    positions, mask_ = choose(2, 1, 63, 30), cases.mask(mask, 2, 8, 63, dtype)
    out = check(implementation, paper, cases, q, k, v, positions, mask_, is_causal=mask == "none", queries=queries)
    assert out.dtype == dtype


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.37])
def test_scale_of_the_model(implementation, paper, cases, scale):
    q, k, v = cases.qkv(n=21, dim=8, dtype=implementation.finest)
    check(implementation, paper, cases, q, k, v, choose(1, 1, 21, 9), scale=scale)


@both_kinds_of_queries
def test_softcap_of_the_model(implementation, paper, cases, queries):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    options, positions = {"scale": 0.7, "softcap": 3.0, "queries": queries}, choose(2, 1, 21, 9)
    got = implementation.run(sparse_attention, q, spared(k, positions), spared(v, positions), positions, **options)
    exact = torch.from_numpy(paper.attention(q, k, v, positions, **options))
    tolerance = 1e-12 if implementation.name == "torch" else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@both_kinds_of_queries
@pytest.mark.parametrize("mask", ["none", "left-padding", "per-head-window"])
def test_positions_per_kv_head(implementation, paper, cases, mask, queries):
    q, k, v = cases.qkv(batch=2, heads="gqa4", n=21, dim=8, dtype=implementation.finest)
    positions, mask_ = choose(2, 2, 21, 9), cases.mask(mask, 2, 8, 21)
    check(implementation, paper, cases, q, k, v, positions, mask_, is_causal=mask == "none", queries=queries)


@pytest.mark.parametrize("mask", ["left-padding", "additive-inf", "additive-min"])
@both_kinds_of_queries
@pytest.mark.parametrize("p", [4, 21])
def test_a_sample_of_padding_only_gives_finite_rows_and_zero_under_a_hard_mask(
    implementation, cases, mask, queries, p
):  # fmt: skip
    q, k, v = cases.qkv(batch=3, n=21, dim=8, dtype=implementation.finest)
    mask_ = cases.mask(mask, 3, 8, 21, implementation.finest)
    mask_[1] = False if mask_.dtype == torch.bool else mask_.min()
    positions = choose(3, 1, 21, p)
    given_ = (q, spared(k, positions), spared(v, positions), positions, mask_)
    out = implementation.run(sparse_attention, *given_, is_causal=False, queries=queries)
    assert out.isfinite().all()
    # finfo.min is a number: softmax over such a row is uniform, in dense attention too.
    if mask != "additive-min":
        assert not out[1].any()
    assert out[0].any()


@pytest.mark.parametrize("mask", MASKS)
@only("torch")
def test_all_tokens_kept_is_dense_attention(implementation, cases, mask):
    q, k, v = cases.qkv(batch=3, n=21, dim=8)
    positions = torch.arange(21).repeat(3, 1, 1)
    mask_ = cases.mask(mask, 3, 8, 21)
    out = implementation.run(sparse_attention, q, k, v, positions, mask_, is_causal=mask == "none")
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_, is_causal=mask == "none", enable_gqa=True
    )
    assert torch.equal(out, dense), "bit for bit: tau = 1 must give the tokens of the original model"


@only("torch")
def test_nan_rows_are_those_of_dense_attention(implementation, cases):
    q, k, v = cases.qkv(batch=2, n=21, dim=8)
    q[0, 3, 5], k[1, 0, 7] = float("nan"), float("inf")
    out = implementation.run(sparse_attention, q, k, v, torch.arange(21).repeat(2, 1, 1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert dense.isnan().any() and not dense.isnan().all()
    torch.testing.assert_close(out, dense, equal_nan=True, rtol=0, atol=0)


@both_kinds_of_queries
@pytest.mark.parametrize("mask", ["none", "left-padding"])
def test_spare_rows_are_never_read(implementation, cases, mask, queries):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    positions, mask_ = choose(2, 1, 21, 9), cases.mask(mask, 2, 8, 21)
    options = {"mask": mask_, "is_causal": mask == "none", "queries": queries}
    clean, dirty = (
        implementation.run(sparse_attention, q, take_kv(k, positions), take_kv(v, positions), positions, **options)
        for take_kv in (gather_tokens, spared)
    )
    assert torch.equal(dirty, clean)


def test_output_is_token_major_so_that_the_models_transpose_copies_nothing(implementation, cases):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, value_dim=6, dtype=implementation.finest)
    for positions in (choose(2, 1, 21, 9), choose(2, 1, 21, 21)):
        kept_kv = gather_tokens(k, positions), gather_tokens(v, positions)
        assert implementation.run(sparse_attention, q, *kept_kv, positions).transpose(1, 2).is_contiguous()


def test_inputs_stay_as_they_are(implementation, cases):
    q, k, v = cases.qkv(n=21, dim=8, dtype=implementation.finest)
    mask, positions = cases.mask("per-head-bias", 1, 8, 21, implementation.finest), choose(1, 1, 21, 9)
    given_ = implementation.given(q, gather_tokens(k, positions), gather_tokens(v, positions), positions, mask)
    copies = [x.clone() for x in given_]
    for queries in ("selected", "all"):
        sparse_attention(*given_, queries=queries, kernel=implementation.kernel)
    assert all(torch.equal(x, copy) for x, copy in zip(given_, copies, strict=True))


def test_empty_batch(implementation):
    q, k, v = torch.ones(0, 4, 6, 8), torch.ones(0, 2, 3, 8), torch.ones(0, 2, 3, 5)
    out = implementation.run(sparse_attention, q, k, v, torch.zeros(0, 1, 3, dtype=torch.int64))
    assert out.shape == (0, 4, 6, 5)


def test_a_mask_of_no_samples_is_none(implementation):
    q, k, v = torch.randn(3, 2, 2, 9, 4)
    positions = torch.tensor([[[0, 3, 8]]]).repeat(2, 1, 1)
    given_ = (q, k[:, :, [0, 3, 8]], v[:, :, [0, 3, 8]], positions)
    nothing = torch.ones(0, 1, 1, 9, dtype=torch.bool)
    got, expected = (implementation.run(sparse_attention, *given_, mask) for mask in (nothing, None))
    assert torch.equal(got, expected)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 30), share=st.floats(0.05, 1.0), seed=st.integers(0, 99),
       queries=st.sampled_from(["selected", "all"]))  # fmt: skip
def test_constant_values_come_out_unchanged(implementation, cases, n, share, seed, queries):
    q, k, _ = cases.qkv(batch=2, n=n, dim=4, seed=seed, dtype=implementation.finest)
    positions = choose(2, 1, n, max(1, int(share * n)), seed)
    keys, values = gather_tokens(k, positions), torch.ones(2, 2, positions.shape[2], 3, dtype=implementation.finest)
    out = implementation.run(sparse_attention, q, keys, values, positions, queries=queries)
    if queries == "all":  # weights sum to one wherever a kept key is visible
        shown = torch.arange(n) >= positions[:, :, :1].squeeze(1)
    else:
        shown = torch.zeros(2, n, dtype=torch.bool).scatter_(1, positions[:, 0], True)
    expected = shown[:, None, :, None].to(implementation.finest).expand_as(out)
    tolerance = 1e-12 if implementation.name == "torch" else 1e-6
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99))
@only("torch", "cuda")
def test_samples_do_not_influence_each_other(implementation, cases, seed):
    q, k, v = cases.qkv(batch=3, n=17, dim=4, seed=seed, dtype=implementation.finest)
    positions = choose(3, 1, 17, 6, seed)
    kept_kv = gather_tokens(k, positions), gather_tokens(v, positions)
    together = implementation.run(sparse_attention, q, *kept_kv, positions)
    q[1:], k[1:], v[1:] = 5.0, float("nan"), float("inf")
    kept_kv = gather_tokens(k, positions), gather_tokens(v, positions)
    alone = implementation.run(sparse_attention, q, *kept_kv, positions)
    assert torch.equal(together[0], alone[0])


@both_kinds_of_queries
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@triton_only
def test_every_shape(implementation, cases, shape, dtype, queries):
    q, k, v, mask, is_causal, p = inputs(shape, dtype)
    positions = cases.choose(q.shape[0], 1, q.shape[2], p)
    out = check_with_torch(implementation, q, k, v, positions, mask, is_causal, queries)
    assert out.transpose(1, 2).is_contiguous(), "as the models read it next"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@gpu_only
def test_every_token_of_every_shape(implementation, cases, shape, dtype):
    q, k, v, mask, is_causal, _ = inputs(shape, dtype)
    everyone = torch.arange(q.shape[2]).repeat(q.shape[0], 1, 1)
    where = None if mask is None else visible(mask).any(-1, keepdim=True).expand(*q.shape[:3], 1)
    given_ = (q, k, v, everyone, mask)
    compare_kernels.check(implementation, sparse_attention, *given_, is_causal=is_causal, where=where, zeros=False)


@both_kinds_of_queries
@triton_only
def test_padding_row_beside_the_causal_flag(implementation, cases, queries):
    q, k, v, mask, _, p = inputs("n500", torch.float32)
    positions = cases.choose(3, 1, 500, p)
    got = check_with_torch(implementation, q, k, v, positions, padding_row("n500"), True, queries)
    given_ = (q, spared(k, positions), spared(v, positions), positions, mask)
    whole = implementation.run(sparse_attention, *given_, is_causal=False, queries=queries)
    torch.testing.assert_close(got, whole)


@both_kinds_of_queries
@triton_only
def test_softcap_scale_and_tokens_per_kv_head(implementation, cases, queries):
    q, k, v, mask, is_causal, p = inputs("additive", torch.float32)
    given_ = (q, k, v, cases.choose(3, 2, 63, p), mask, is_causal, queries)
    check_with_torch(implementation, *given_, scale=0.7, softcap=3.0)


@triton_only
def test_queries_of_the_kept_tokens_only(implementation, cases):
    q, k, v, mask, is_causal, p = inputs("n500", torch.float32)
    positions = cases.choose(3, 1, 500, p)
    others = spared(k, positions), spared(v, positions), positions, mask
    rows = positions.unsqueeze(3).expand(-1, q.shape[1], -1, q.shape[3])
    whole, few = (implementation.run(sparse_attention, x, *others, is_causal=is_causal) for x in (q, q.gather(2, rows)))
    assert torch.equal(few, whole.gather(2, rows[..., : v.shape[3]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["n500", "n1025", "narrow-values"])
@only("interpreted")
def test_every_tiling_gives_the_same(implementation, cases, shape, dtype):
    q, k, v, mask, is_causal, p = inputs(shape, dtype)
    positions = cases.choose(q.shape[0], 1, q.shape[2], p)
    given_ = (q, spared(k, positions), spared(v, positions), positions, mask, is_causal, None, None, False)
    results = [implementation.compute(_attend_triton, *given_, tiling) for tiling in tilings(q, v, mask)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 200), share=st.floats(0.01, 1.0), heads=st.sampled_from(["mha", "gqa4", "gqa7"]),
       dim=st.integers(1, 40), value_dim=st.integers(1, 40), batch=st.integers(1, 3), causal=st.booleans(),
       queries=st.sampled_from(["selected", "all"]), seed=st.integers(0, 99))  # fmt: skip
@triton_only
def test_any_shape(implementation, cases, n, share, heads, dim, value_dim, batch, causal, queries, seed):
    q, k, v = cases.qkv(batch=batch, heads=heads, n=n, dim=dim, value_dim=value_dim, dtype=torch.float32, seed=seed)
    positions = cases.choose(batch, 1, n, max(1, int(share * n)), seed)
    check_with_torch(implementation, q, k, v, positions, None, causal, queries)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
@gpu_only
def test_a_large_prompt(implementation, cases, name, dtype, kernel):
    batch, heads, n, dim, padded = LARGE[name]
    q, k, v = cases.qkv(batch=batch, heads=heads, n=n, dim=dim, dtype=dtype)
    row = cases.padding(batch, n, "left")[:, None, None] if padded else None
    positions = cases.choose(batch, 1, n, n // 3)
    given_ = (q, gather_tokens(k, positions), gather_tokens(v, positions), positions, row)
    real = None if row is None else row.transpose(2, 3).expand(-1, q.shape[1], -1, 1)
    options = {"is_causal": True, "kernel": kernel, "where": real, "zeros": False}
    for queries in ("selected", "all") if dtype == torch.bfloat16 else ("selected",):
        compare_kernels.check(implementation, sparse_attention, *given_, queries=queries, **options)


@gpu_only
def test_auto_measures_once_and_remembers(implementation, cases, monkeypatch):
    monkeypatch.setattr(autotune, "_winners", {})
    q, k, v = implementation.given(*cases.qkv(1, (8, 8), 2048, 128, dtype=torch.bfloat16))
    (positions,) = implementation.given(cases.choose(1, 1, 2048, 1024))
    keys, values = gather_kv(k, v, positions)
    first = sparse_attention(q, keys, values, positions)
    (winner,) = autotune.winners().values()
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail(f"measured again, {winner} was known"))
    torch.testing.assert_close(sparse_attention(q, keys, values, positions), first)


Q, K, V = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 5)
P = torch.arange(3).repeat(2, 1, 1)
BAD = {
    "queries": ({"queries": "some"}, 'queries: expected "selected", "hold" or "all", got \'some\''),
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
