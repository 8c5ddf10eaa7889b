"""Private operators of PyTorch give what we take them to give."""

import torch

from zipvl_compile.kernels.common.private import FLASH_ON_CPU


def test_attention_and_its_log_sum_exp():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    bias = torch.randn(2, 1, 9, 9, generator=generator, dtype=torch.float64)
    out, lse = FLASH_ON_CPU(q, k, v, 0.0, False, attn_mask=bias, scale=0.3)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.mT * 0.3 + bias
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
