"""The kernel of sparse_attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare_kernels import DTYPES, SHAPES, check, inputs, padding_row

from zipvl_compile.kernels.common.masks import take, visible
from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.sparse_attention import _attend_triton, sparse_attention, tilings


def choose(batch, groups, n, p, seed=0):
    return (
        torch.rand(batch, groups, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :p].sort(-1).values
    )


def spared(x, positions):
    """Return the kept tokens as a cache holds them: rows that nobody wrote after them."""
    out = gather_tokens(x, positions, 4)
    out[:, :, positions.shape[2] :] = float("nan")
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


def check_attention(q, k, v, positions, mask, is_causal, queries, **options):
    where = answered(q, positions, mask, is_causal, queries)
    keys, values = spared(k, positions), spared(v, positions)
    options |= {"is_causal": is_causal, "queries": queries}
    return check(sparse_attention, q, keys, values, positions, mask, where=where, **options)


@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, dtype, queries):
    q, k, v, mask, is_causal, p = inputs(shape, dtype)
    out = check_attention(q, k, v, choose(q.shape[0], 1, q.shape[2], p), mask, is_causal, queries)
    assert out.transpose(1, 2).is_contiguous(), "as the models read it next"


@pytest.mark.parametrize("queries", ["selected", "all"])
def test_padding_row_beside_the_causal_flag(queries):
    q, k, v, mask, _, p = inputs("n500", torch.float32)
    positions = choose(3, 1, 500, p)
    got = check_attention(q, k, v, positions, padding_row("n500"), True, queries)
    whole = sparse_attention(
        q, spared(k, positions), spared(v, positions), positions, mask,
        is_causal=False, queries=queries, kernel="triton",
    )  # fmt: skip
    torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("queries", ["selected", "all"])
def test_softcap_scale_and_tokens_per_kv_head(queries):
    q, k, v, mask, is_causal, p = inputs("additive", torch.float32)
    check_attention(q, k, v, choose(3, 2, 63, p), mask, is_causal, queries, scale=0.7, softcap=3.0)


def test_queries_of_the_kept_tokens_only():
    q, k, v, mask, is_causal, p = inputs("n500", torch.float32)
    positions = choose(3, 1, 500, p)
    keys, values = spared(k, positions), spared(v, positions)
    options = {"is_causal": is_causal, "kernel": "triton"}
    rows = positions.unsqueeze(3).expand(-1, q.shape[1], -1, q.shape[3])
    whole = sparse_attention(q, keys, values, positions, mask, **options)
    few = sparse_attention(q.gather(2, rows), keys, values, positions, mask, **options)
    assert torch.equal(few, whole.gather(2, rows[..., : v.shape[3]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["n500", "n1025", "narrow-values"])
def test_every_tiling_gives_the_same(shape, dtype):
    q, k, v, mask, is_causal, p = inputs(shape, dtype)
    positions = choose(q.shape[0], 1, q.shape[2], p)
    results = [
        _attend_triton(
            q, spared(k, positions), spared(v, positions), positions, mask, is_causal, None, None, False, tiling
        )
        for tiling in tilings(q, v, mask)
    ]  # fmt: skip
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 200), share=st.floats(0.01, 1.0), heads=st.sampled_from(["mha", "gqa4", "gqa7"]),
       dim=st.integers(1, 40), value_dim=st.integers(1, 40), batch=st.integers(1, 3), causal=st.booleans(),
       queries=st.sampled_from(["selected", "all"]), seed=st.integers(0, 99))  # fmt: skip
def test_any_shape(cases, n, share, heads, dim, value_dim, batch, causal, queries, seed):
    q, k, v = cases.qkv(batch=batch, heads=heads, n=n, dim=dim, value_dim=value_dim, dtype=torch.float32, seed=seed)
    check_attention(q, k, v, choose(batch, 1, n, max(1, int(share * n)), seed), None, causal, queries)
