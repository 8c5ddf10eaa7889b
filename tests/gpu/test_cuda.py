"""The operators and a whole generate on CUDA, against the CPU. Run by `make gpu` where there is a device."""

from __future__ import annotations

import pytest
import torch
from tiny_llava import compiled, inputs, model

from zipvl_compile.kernels.decode_attention import append_tokens, decode_attention
from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.select_tokens import select_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.token_scores import token_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def case(n, dtype, batch=2, heads=8, kv_heads=2, width=64, pad=0):
    """Return q, k, v and a causal mask with left padding of the first sample, on the CPU in float64."""
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(batch, heads, n, width, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, n, width, generator=generator)
    mask = None
    if pad:
        mask = torch.ones(batch, 1, n, n, dtype=torch.bool).tril()
        mask[0, :, :, :pad] = False
    return *(x.to(dtype).double() for x in (q, k, v)), mask


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "pad"), [(1, 0), (63, 0), (500, 17), (1025, 0), (4096, 100)])
def test_prefill_operators_equal_the_cpu_in_float64(n, pad, dtype):
    q, k, v, mask = case(n, dtype, pad=pad)
    cuda = [x.to("cuda", dtype) for x in (q, k, v)]
    mask_cuda = None if mask is None else mask.cuda()
    scores, visible = token_scores(q, k, mask)
    scores_cuda, visible_cuda = token_scores(*cuda[:2], mask_cuda)
    torch.testing.assert_close(scores_cuda.cpu().double(), scores, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(visible_cuda.cpu().double(), visible)
    # Equal scores give equal positions on every device; scores in another dtype may not.
    positions = select_tokens(scores.float(), visible.float(), tau=0.9)
    assert torch.equal(select_tokens(scores.float().cuda(), visible.float().cuda(), tau=0.9).cpu(), positions)
    kept = [gather_tokens(x, positions) for x in (k, v)]
    kept_cuda = [gather_tokens(x, positions.cuda()) for x in cuda[1:]]
    out = sparse_attention(q, *kept, positions, mask)
    out_cuda = sparse_attention(cuda[0], *kept_cuda, positions.cuda(), mask_cuda)
    torch.testing.assert_close(out_cuda.cpu().double(), out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_operators_equal_the_cpu_in_float64(dtype):
    q, k, v, _ = case(300, dtype)
    positions = torch.arange(0, 300, 3).repeat(2, 1, 1)
    new = [x[:, :, :1] for x in (q, k, v)]
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        where = positions.to(device)
        keys, values = (gather_tokens(x.to(device, kind), where, spare=8) for x in (k, v))
        append_tokens(keys, values, *(x.to(device, kind) for x in new[1:]), positions.shape[2])
        mask = torch.rand(2, 1, 1, 301, generator=torch.Generator().manual_seed(0)).to(device) > 0.3
        results += [
            decode_attention(new[0].to(device, kind), keys, values, where, 300, 301, m).cpu().double()
            for m in (None, mask)
        ]
    for cpu, cuda in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(cuda, cpu, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("pad", [0, 7])
def test_generate_at_tau_1_equals_eager(pad):
    x = {name: value.cuda() for name, value in inputs(batch=2, text=20, pad=pad).items()}
    f = compiled(tau=1.0, inner="inductor").cuda()
    expected = model().cuda().generate(**x, max_new_tokens=12, do_sample=False)
    assert torch.equal(f.generate(**x, max_new_tokens=12, do_sample=False), expected)


def test_memory_of_dropped_tokens_is_freed():
    x = {name: value.cuda() for name, value in inputs(text=60).items()}
    with torch.no_grad():
        cache = compiled(keep_ratio=0.3).cuda()(**x, use_cache=True).past_key_values
    layer = cache.layers[0]
    tokens = layer.keys.untyped_storage().nbytes() // (layer.keys.shape[1] * layer.keys.shape[3] * 4)
    assert tokens == layer.kept.shape[2] + 32
