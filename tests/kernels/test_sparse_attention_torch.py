"""What is particular to attention by PyTorch: lengths that are rounded up to one of few, for cuDNN."""

from contextlib import nullcontext

import pytest
import torch
from support import compare_kernels
from support.implementations import gpu_only

from zipvl_compile.cache.buffers import spare_tokens
from zipvl_compile.kernels.gather_tokens import gather_kv, gather_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.sparse_attention_torch import attend_cudnn, plan_length


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
    # The backend that this is for needs a GPU, where the test below runs it; what surrounds it does not.
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


@pytest.mark.parametrize("p", [1000, 1500, 2048])
@pytest.mark.parametrize("heads", ["gqa4", (8, 8)], ids=str)
@gpu_only
def test_cudnn_at_the_length_of_a_plan(implementation, cases, heads, p):
    q, k, v = cases.qkv(1, heads, 4096, 128, dtype=torch.bfloat16)
    positions = cases.choose(1, 1, 4096, p)

    def attend(q, k, v, positions, kernel):
        if kernel == "torch":
            return sparse_attention(q, k, v, positions, kernel=kernel)
        return attend_cudnn(q, *gather_kv(k, v, torch.arange(p, device=q.device)[None, None], 256), positions, None)

    kept_kv = gather_tokens(k, positions), gather_tokens(v, positions)
    compare_kernels.check(implementation, attend, q, *kept_kv, positions)
