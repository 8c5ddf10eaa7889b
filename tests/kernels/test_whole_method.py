"""The operators one after the other, as the prefill pass calls them, against the whole method in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.implementations import triton_only

from zipvl_compile.kernels.append_tokens import append_tokens
from zipvl_compile.kernels.decode_attention import decode_attention
from zipvl_compile.kernels.gather_tokens import gather_kv
from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.kernels.select_tokens import select_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.token_scores import token_scores

PROBES = {"recent_probes": 12, "random_probes": 12, "seed": 4}


def prefill(q, k, v, mask=None, is_causal=True, queries="selected", groups=1, kernel="torch", **selection):
    """Return output, kept keys, kept values and positions, by the operators."""
    scores, visible = token_scores(q, k, mask, is_causal=is_causal, groups=groups, kernel=kernel, **PROBES)
    positions = select_tokens(scores, visible, kernel=kernel, **selection)
    keys, values = gather_kv(k, v, positions, 4, kernel)
    out = sparse_attention(q, keys, values, positions, mask, is_causal=is_causal, queries=queries, kernel=kernel)
    return out, keys, values, positions


def dense_attention(q, k, v, mask, is_causal):
    """Return what the model computes without zipvl; `D ** -0.5` and PyTorch's default differ in the last bit."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)


def by_the_paper(paper, q, k, v, mask=None, is_causal=True, queries="selected", groups=1, **selection):
    """Return output and positions, by the float64 model."""
    rows = probe_rows(q.shape[2], PROBES["recent_probes"], PROBES["random_probes"], PROBES["seed"])
    scores, visible = paper.scores(q, k, rows, mask=mask, is_causal=is_causal, groups=groups)
    positions = paper.selection(scores, visible, **selection)
    return paper.attention(q, k, v, positions, mask=mask, is_causal=is_causal, queries=queries), positions


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("groups", [1, 2], ids=["layer", "kv_head"])
@pytest.mark.parametrize(
    "selection",
    [{"tau": 0.5}, {"tau": 0.9}, {"tau": 0.975, "keep_recent": 5}, {"tau": 1.0}, {"keep_ratio": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "left-padding", "right-padding", "additive-inf", "prefix"])
def test_prefill(paper, cases, mask, selection, groups, queries):
    q, k, v = cases.qkv(batch=3, n=41, dim=8, value_dim=6, seed=1)
    options = dict(is_causal=mask == "none", queries=queries, groups=groups, **selection)
    mask_ = cases.mask(mask, 3, 8, 41)
    out, keys, values, positions = prefill(q, k, v, mask_, **options)
    exact, expected = by_the_paper(paper, q, k, v, mask_, **options)
    assert np.array_equal(positions.numpy(), expected)
    assert selection.get("tau") == 1 or positions.shape[2] < 41, "the case must drop something"
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    for b in range(3):
        for h in range(2):
            kept = expected[b, h * groups // 2]
            assert torch.equal(keys[b, h, : len(kept)], k[b, h, kept])
            assert torch.equal(values[b, h, : len(kept)], v[b, h, kept])


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("mask", ["none", "left-padding", "additive-inf"])
@triton_only
def test_prefill_by_the_kernels(implementation, paper, cases, mask, queries):
    q, k, v = cases.qkv(batch=2, n=41, dim=8, value_dim=6, dtype=torch.float32, seed=1)
    mask_ = cases.mask(mask, 2, 8, 41, torch.float32)
    options = {"is_causal": mask == "none", "queries": queries}
    out, keys, values, positions = implementation.run(prefill, q, k, v, mask_, tau=0.9, **options)
    expected = by_the_paper(paper, q, k, v, mask_, tau=0.9, **options)[1]
    assert np.array_equal(positions.numpy(), expected) and positions.shape[2] < 41
    exact = paper.attention(q, k, v, positions, mask=mask_, **options)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-5, atol=1e-5)
    for x, kept in ((k, keys), (v, values)):
        assert all(torch.equal(kept[b, :, : positions.shape[2]], x[b][:, positions[b, 0]]) for b in range(2))


@pytest.mark.parametrize("mask", ["none", "left-padding"])
def test_prefill_and_ten_decode_steps(paper, cases, mask):
    prompt, steps = 41, 10
    n = prompt + steps
    q, k, v = cases.qkv(batch=2, n=n, dim=8, seed=2)
    full = cases.mask(mask, 2, 8, n)
    first = None if full is None else full[:, :, :prompt, :prompt]
    _, keys, values, positions = prefill(
        q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], first, is_causal=mask == "none", tau=0.8
    )
    p = positions.shape[2]
    assert p < prompt
    keys, values = (
        torch.cat([x[:, :, :p], torch.full_like(x[:, :, :1], float("nan")).expand(-1, -1, steps, -1)], 2)
        for x in (keys, values)
    )
    for step in range(steps):
        i = prompt + step
        append_tokens(keys, values, k[:, :, i : i + 1], v[:, :, i : i + 1], p + step)
        row = None if full is None else full[:, :, i : i + 1, : i + 1]
        out = decode_attention(q[:, :, i : i + 1], keys, values, positions, prompt, i + 1, row)
        exact = paper.decode(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], positions, prompt, mask=row)
        np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("mask", ["none", "left-padding", "per-head-bias"])
def test_tau_1_is_dense_attention(cases, mask, queries, dtype):
    q, k, v = cases.qkv(batch=2, n=41, dim=8, dtype=dtype)
    mask_ = cases.mask(mask, 2, 8, 41, dtype)
    out, *_, positions = prefill(q, k, v, mask_, is_causal=mask == "none", queries=queries, tau=1.0)
    dense = dense_attention(q, k, v, mask_, is_causal=mask == "none")
    assert positions.tolist() == [[list(range(41))]] * 2
    if queries == "all" and mask == "none":  # the causal flag becomes a mask there: another summation order
        cases.assert_as_accurate(out, cases.plain_attention(q, k, v), dense.double())
    else:
        assert torch.equal(out, dense)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "both"])
@pytest.mark.parametrize("queries", ["selected", "all"])
def test_a_non_finite_input_gives_what_dense_attention_gives(cases, bad, where, queries):
    q, k, v = cases.qkv(batch=2, n=24, dim=8)  # every row is a probe row
    if where != "k":
        q[1, 5, 9] = bad
    if where != "q":
        k[1, 1, 6] = bad
    out, *_, positions = prefill(q, k, v, queries=queries, tau=0.5)
    dense = dense_attention(q, k, v, None, is_causal=True)
    assert not dense[1].isfinite().all()
    assert positions.tolist() == [[list(range(24))]] * 2, "no ranking to trust: everything stays"
    assert torch.equal(out.isnan(), dense.isnan())
    torch.testing.assert_close(out, dense, equal_nan=True, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["left-padding", "additive-inf", "additive-min"])
@pytest.mark.parametrize("selection", [{"tau": 0.8}, {"tau": 1.0}, {"keep_ratio": 0.3}], ids=str)
def test_a_sample_of_padding_only_leaves_the_others_right(paper, cases, mask, selection):
    q, k, v = cases.qkv(batch=3, n=41, dim=8)
    mask_ = cases.mask(mask, 3, 8, 41)
    mask_[1] = False if mask_.dtype == torch.bool else mask_.min()
    out, *_, positions = prefill(q, k, v, mask_, is_causal=False, **selection)
    exact, expected = by_the_paper(paper, q, k, v, mask_, is_causal=False, **selection)
    assert out.isfinite().all()
    assert np.array_equal(positions.numpy(), expected)
    shown = mask_ if mask_.dtype == torch.bool else mask_ == 0
    answered = torch.from_numpy(exact != 0).any(-1) & shown.any(-1)
    np.testing.assert_allclose(out[answered].numpy(), exact[answered.numpy()], rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_order_of_heads_inside_a_group_changes_no_selection(cases, order, seed):
    q, k, v = cases.qkv(batch=2, heads="gqa4", n=41, dim=4, seed=seed)
    shuffled = q.unflatten(1, (2, 4))[:, :, list(order)].flatten(1, 2)
    before, after = prefill(q, k, v, tau=0.8), prefill(shuffled, k, v, tau=0.8)
    assert torch.equal(before[3], after[3])
    torch.testing.assert_close(after[0], before[0].unflatten(1, (2, 4))[:, :, list(order)].flatten(1, 2))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99), taus=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)))
def test_growing_tau_never_drops_a_token(cases, seed, taus):
    q, k, v = cases.qkv(n=41, dim=4, seed=seed)
    few, many = (set(prefill(q, k, v, tau=tau)[3].flatten().tolist()) for tau in sorted(taus))
    assert few <= many and 40 in few


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99))
def test_another_sample_changes_only_how_many_tokens_stay(cases, seed):
    q, k, v = cases.qkv(batch=2, n=41, dim=4, seed=seed)
    q[1] *= 0.1  # flat attention: needs more tokens
    together = prefill(q, k, v, tau=0.8)
    p = together[3].shape[2]
    alone = prefill(q[:1], k[:1], v[:1], keep_ratio=p / 41)
    assert prefill(q[:1], k[:1], v[:1], tau=0.8)[3].shape[2] < p
    assert torch.equal(together[3][0], alone[3][0])
    torch.testing.assert_close(together[0][0], alone[0][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 24, 25, 129])
def test_every_kept_row_is_finite_at_every_size(cases, n):
    q, k, v = cases.qkv(batch=3, n=n, dim=8, dtype=torch.float16)
    out, _, _, positions = prefill(q, k, v, cases.mask("left-padding", 3, 8, n), is_causal=False, tau=0.8)
    assert out.isfinite().all()
    assert (positions[..., -1] == n - 1).all()


def test_empty_batch_goes_through():
    q, k = torch.ones(0, 4, 9, 8), torch.ones(0, 2, 9, 8)
    out, keys, values, positions = prefill(q, k, k, tau=0.8)
    assert out.shape == (0, 4, 9, 8) and positions.shape == (0, 1, 9) and keys.shape == values.shape == (0, 2, 13, 8)
