"""Dense attention over chosen tokens against the float64 model: softcap, masks, and queries that see nothing."""

import pytest
import torch
from support.cases import MASKS
from support.implementations import only

from zipvl_compile.kernels.common.dense_attention import dense_attention, soft_capped

everywhere = only("torch", "cuda")


def exact(paper, q, k, v, **options):
    everyone = torch.arange(k.shape[2]).repeat(q.shape[0], 1, 1)
    return torch.from_numpy(paper.attention(q, k, v, everyone, **options))


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("heads", ["mha", "gqa4"])
@pytest.mark.parametrize("mask", MASKS)
@everywhere
def test_every_mask(implementation, paper, cases, mask, heads, softcap):
    q, k, v = cases.qkv(batch=2, heads=heads, n=21, dim=8, value_dim=6)
    mask_ = cases.mask(mask, 2, q.shape[1], 21)
    out = implementation.compute(dense_attention, q, k, v, mask_, mask == "none", 0.3, softcap)
    expected = exact(paper, q, k, v, mask=mask_, is_causal=mask == "none", scale=0.3, softcap=softcap)
    shown = torch.ones(()) if mask_ is None else mask_ if mask_.dtype == torch.bool else mask_ > torch.finfo().min / 2
    sees = shown.bool().expand(2, q.shape[1], 21, 21).any(-1, keepdim=True)  # finfo.min is a number: SDPA adds it
    torch.testing.assert_close(out.masked_fill(~sees, 0), expected.masked_fill(~sees, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@only("torch")
def test_a_query_that_sees_nothing_gets_zeros(implementation, cases, softcap):
    q, k, v = cases.qkv(batch=2, n=21, dim=8)
    shown = cases.mask("left-padding", 2, 8, 21)
    shown[1] = False
    for mask in (shown, torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, float("-inf"))):
        out = implementation.compute(dense_attention, q, k, v, mask, False, None, softcap)
        assert out[0].any() and not out[1].any()


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@everywhere
def test_a_mask_may_be_finer_than_the_queries(implementation, cases, dtype, softcap):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, dtype=dtype)
    mask = cases.mask("additive-inf", 2, 8, 21, torch.float32)
    out = implementation.compute(dense_attention, q, k, v, mask, False, None, softcap)
    same = implementation.compute(dense_attention, q, k, v, mask.to(dtype), False, None, softcap)
    assert out.dtype == dtype and torch.equal(out, same)


def test_softcap_bends_and_is_the_identity_without_one():
    scores = torch.tensor([-100.0, -0.01, 0.0, 2.0, 100.0], dtype=torch.float64)
    assert soft_capped(scores, None) is scores
    capped = soft_capped(scores, 5.0)
    torch.testing.assert_close(capped, 5 * (scores / 5).tanh())
    assert capped.abs().max() <= 5 and (capped.diff() > 0).all()
