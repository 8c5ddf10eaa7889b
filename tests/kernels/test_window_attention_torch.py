"""What is particular to window_attention by PyTorch: the first visible tokens, and the log-sum-exp of a part."""

import pytest
import torch

from zipvl_compile.kernels.common.dense_attention import dense_attention
from zipvl_compile.kernels.window_attention_torch import _with_lse, first_visible, kept_tokens


def test_first_visible_tokens():
    visible = torch.tensor([[0.0, 0, 3, 0, 1, 1], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    assert first_visible(visible, 2).tolist() == [[2, 4], [0, 1], [5, 6], [6, 6]]
    assert first_visible(visible > 0, 0).shape == (4, 0)
    assert first_visible(visible[:, :3], 9).tolist() == [[2, 3, 3], [0, 1, 2], [3, 3, 3], [3, 3, 3]]


def test_kept_tokens():
    assert kept_tokens(torch.tensor([[[0, 3], [1, 2]]]), 4).int().tolist() == [[[1, 0, 0, 1], [0, 1, 1, 0]]]


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
    out, lse = _with_lse(q, k, v, mask, is_causal, 0.4, softcap)
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
