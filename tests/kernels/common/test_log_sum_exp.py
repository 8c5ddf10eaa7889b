"""Parts of one softmax: their log-sum-exps, and what they are joined to."""

import pytest
import torch

from zipvl_compile.kernels.common.dense_attention import dense_attention
from zipvl_compile.kernels.common.log_sum_exp import joined, only, with_lse


@pytest.mark.parametrize("value_dim", [16, 6, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["none", "bool", "bias"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_log_sum_exp(cases, dtype, is_causal, kind, softcap, value_dim):
    q, k, v = cases.qkv(batch=2, n=30, value_dim=value_dim, dtype=dtype)
    shown = torch.rand(2, 8, 30, 30, generator=torch.Generator().manual_seed(0)) < 0.7
    shown[:, 3, 7] = False
    if kind == "none":
        shown[:] = True
    mask = {"none": None, "bool": shown}.get(kind, torch.ones(shown.shape, dtype=dtype).masked_fill(~shown, -torch.inf))
    out, lse = with_lse(q, k, v, mask, is_causal, 0.4, softcap)
    if is_causal:
        shown = shown.tril()
    scores = q.double() @ k.double().repeat_interleave(4, 1).mT * 0.4
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + (kind == "bias")
    exact = scores.masked_fill(~shown, -torch.inf).logsumexp(-1, keepdim=True)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    seen = shown.any(-1, keepdim=True)
    torch.testing.assert_close(lse.double()[seen], exact[seen], rtol=tolerance, atol=tolerance)
    assert (lse[~seen] == torch.finfo(lse.dtype).min).all() and not out[~seen.squeeze(-1)].any()
    dense = dense_attention(q, k, v, shown, False, 0.4, softcap)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(out, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_are_joined_to_one_softmax(cases, dtype):
    q, k, v = cases.qkv(batch=2, n=30, dtype=dtype)
    parts = [with_lse(q, k[:, :, keys], v[:, :, keys], None, False, None, None) for keys in (slice(9), slice(9, 30))]
    exact = dense_attention(q.double(), k.double(), v.double(), None, False, None, None)
    torch.testing.assert_close(joined(*parts[0], *parts[1]).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_part_that_sees_nothing_has_no_weight(cases):
    q, k, v = cases.qkv(n=6)
    nothing = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    empty, some = (with_lse(q, k, v, mask, False, None, None) for mask in (nothing, ~nothing))
    for parts in ((*empty, *some), (*some, *empty)):
        assert torch.equal(joined(*parts), some[0])
    assert not joined(*empty, *empty).any()


def test_only():
    shown = torch.tensor([True, False])
    assert only(torch.tensor([True, True]), shown).tolist() == [True, False]
    assert only(torch.tensor([3.0, 3.0]), shown).tolist() == [3.0, float("-inf")]
