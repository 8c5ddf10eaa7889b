"""The kernels of token_scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare_kernels import DTYPES, SHAPES, check, exactly, inputs, padding_row

from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.kernels.token_scores import token_scores


def accumulated(*tensors, **options):
    return token_scores(*tensors, **options)[0]


def check_scores(q, k, mask, **options):
    """Compare scores with PyTorch, and visible rows exactly; return the scores."""
    plain = token_scores(*map(exactly, (q, k, mask)), kernel="torch", **options)
    got = check(accumulated, q, k, mask, unit=float(plain[0].max()), **options)
    seen = token_scores(q, k, mask, kernel="triton", **options)[1]
    assert seen.dtype == torch.float32 and torch.equal(seen.double(), plain[1])
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, dtype):
    q, k, _, mask, is_causal, _ = inputs(shape, dtype)
    check_scores(q, k, mask, is_causal=is_causal, recent_probes=40, random_probes=30)


@pytest.mark.parametrize("shape", ["one-kept", "n500"])
def test_padding_row_beside_the_causal_flag(shape):
    q, k, _, mask, _, _ = inputs(shape, torch.float32)
    got = check_scores(q, k, padding_row(shape), is_causal=True, recent_probes=64, random_probes=64)
    whole = token_scores(q, k, mask, is_causal=False, recent_probes=64, random_probes=64, kernel="triton")[0]
    torch.testing.assert_close(got, whole)


def test_softcap_scale_and_groups():
    q, k, _, mask, is_causal, _ = inputs("additive", torch.float32)
    for groups in (1, 2):
        probes = {"recent_probes": 9, "random_probes": 9}
        check_scores(q, k, mask, is_causal=is_causal, scale=0.7, softcap=3.0, groups=groups, **probes)


def test_queries_of_the_probe_rows_only():
    q, k, _, mask, is_causal, _ = inputs("n500", torch.float32)
    options = {"is_causal": is_causal, "recent_probes": 12, "random_probes": 8, "kernel": "triton"}
    probes = q[:, :, probe_rows(500, 12, 8, 0)]
    assert torch.equal(token_scores(probes, k, mask, **options)[0], token_scores(q, k, mask, **options)[0])


def test_strides_of_a_transposed_layout():
    q, k, _, mask, is_causal, _ = inputs("all-kept", torch.float32)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    head_last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k)]  # elements of a head apart
    expected = token_scores(q, k, mask, is_causal=is_causal, kernel="triton")[0]
    for other in (token_major, head_last):
        assert torch.equal(token_scores(*other, mask, is_causal=is_causal, kernel="triton")[0], expected)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 90), heads=st.sampled_from(["mha", "gqa4", "gqa7"]), dim=st.integers(1, 33),
       batch=st.integers(1, 3), probes=st.integers(1, 40), seed=st.integers(0, 99))  # fmt: skip
def test_rows_give_away_all_their_attention(cases, n, heads, dim, batch, probes, seed):
    q, k, _ = cases.qkv(batch=batch, heads=heads, n=n, dim=dim, dtype=torch.float32, seed=seed)
    scores = check_scores(q, k, None, recent_probes=probes // 2, random_probes=probes - probes // 2)
    torch.testing.assert_close(scores.sum(-1), torch.full((batch, 1), float(min(n, probes))), rtol=1e-5, atol=1e-5)
