"""Every Triton kernel on a GPU against float64 on the CPU, over the shapes of the interpreted tests and larger ones."""

from __future__ import annotations

import pytest
import torch
from support.cases import assert_as_accurate, padding, qkv
from support.compare_kernels import DTYPES, SHAPES, exactly, inputs

from zipvl_compile.kernels.append_tokens import append_tokens
from zipvl_compile.kernels.common import autotune as fastest
from zipvl_compile.kernels.decode_attention import decode_attention
from zipvl_compile.kernels.gather_tokens import gather_kv, gather_tokens
from zipvl_compile.kernels.select_tokens import select_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.sparse_attention_torch import attend_cudnn
from zipvl_compile.kernels.token_scores import token_scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LARGE = {  # batch, heads, n, head_dim, padded
    "4k": (1, (8, 8), 4096, 128, False),
    "4k-gqa": (2, (16, 4), 4096, 64, True),
    "9k-odd": (1, (4, 2), 9001, 80, False),
}
KERNELS = ("triton", "auto", "torch")


def cuda(*tensors):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in tensors]


def check(operator, *tensors, unit=1.0, where=None, kernel="triton", **options):
    """Assert that the kernel errs at most twice as much as PyTorch in the same dtype on the GPU, plus the floor."""
    got = operator(*cuda(*tensors), kernel=kernel, **options).cpu()
    exact = operator(*map(exactly, tensors), kernel="torch", **options)
    plain = operator(*cuda(*tensors), kernel="torch", **options).cpu()
    assert not got.isnan().any()
    if where is not None:
        got, exact, plain = (x.masked_fill(~where, 0) for x in (got, exact, plain))
    assert_as_accurate(got, plain, exact, unit=unit)
    return got


def choose(batch, groups, n, p, seed=0):
    draw = torch.rand(batch, groups, n, generator=torch.Generator().manual_seed(seed))
    return draw.argsort(-1)[..., :p].sort(-1).values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_kernels_on_every_shape(shape, dtype):
    q, k, v, mask, is_causal, p = inputs(shape, dtype)
    positions = choose(q.shape[0], 1, q.shape[2], p)
    options = {"mask": mask, "is_causal": is_causal}
    check(lambda *x, **o: token_scores(*x, **o)[0], q, k, mask, is_causal=is_causal, unit=float(q.shape[2]))
    seen = token_scores(*cuda(q, k), **{**options, "mask": cuda(mask)[0]}, kernel="triton")[1].cpu()
    assert torch.equal(seen, token_scores(q.float(), k.float(), mask, is_causal=is_causal)[1])
    keys, values = gather_kv(*cuda(k, v, positions), 4, "triton")
    for got, x in ((keys, k), (values, v)):
        assert torch.equal(got[:, :, :p].cpu(), gather_tokens(x, positions))
    kept = [gather_tokens(x, positions) for x in (k, v)]
    shown = torch.ones(()) if mask is None else (exactly(mask) > -torch.inf if mask.is_floating_point() else mask)
    sees = None if mask is None else shown.any(-1, keepdim=True).expand(q.shape[0], q.shape[1], q.shape[2], 1)
    for every in ("selected", "all"):
        if mask is None:  # with a mask, what a query that sees no kept key gets is the interpreted tests' matter
            check(sparse_attention, q, *kept, positions, None, is_causal=is_causal, queries=every)
    full = torch.arange(q.shape[2]).repeat(q.shape[0], 1, 1)
    check(sparse_attention, q, k, v, full, mask, is_causal=is_causal, where=sees)


@pytest.mark.parametrize("rule", [{"tau": 0.9}, {"tau": 0.5, "keep_recent": 9}, {"keep_ratio": 0.3}], ids=str)
@pytest.mark.parametrize("n", [1, 63, 500, 1025, 16384, 50_000])
def test_selection_is_the_same_on_every_device(n, rule):
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(2, 2, n, generator=generator) ** 6
    seen = torch.randint(0, 5, (2, n), generator=generator).float()
    for x in (scores, (scores * 8).round() / 8):
        expected = select_tokens(x, seen, kernel="torch", **rule)
        for kernel in KERNELS:
            assert torch.equal(select_tokens(x.cuda(), seen.cuda(), kernel=kernel, **rule).cpu(), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_prefill(name, dtype, kernel):
    batch, heads, n, dim, padded = LARGE[name]
    q, k, v = qkv(batch=batch, heads=heads, n=n, dim=dim, dtype=dtype)
    row = padding(batch, n, "left")[:, None, None] if padded else None
    unit = float(n if padded else 128)
    check(lambda *x, **o: token_scores(*x, **o)[0], q, k, row, is_causal=True, kernel=kernel, unit=unit)
    positions = choose(batch, 1, n, n // 3)
    kept = [gather_tokens(x, positions) for x in (k, v)]
    real = None if row is None else row.transpose(2, 3).expand(-1, q.shape[1], -1, 1)
    check(sparse_attention, q, *kept, positions, row, is_causal=True, kernel=kernel, where=real)
    if dtype == torch.bfloat16:
        check(sparse_attention, q, *kept, positions, row, is_causal=True, queries="all", kernel=kernel, where=real)


@pytest.mark.parametrize("p", [1000, 1500, 2048])
@pytest.mark.parametrize("heads", ["gqa4", (8, 8)], ids=str)
def test_cudnn_at_the_length_of_a_plan(heads, p):
    q, k, v = qkv(1, heads, 4096, 128, dtype=torch.bfloat16)
    positions = choose(1, 1, 4096, p)
    kept = [gather_tokens(x, positions) for x in (k, v)]

    def attend(q, k, v, positions, kernel):
        if kernel == "torch":
            return sparse_attention(q, k, v, positions, kernel=kernel)
        return attend_cudnn(q, *gather_kv(k, v, torch.arange(p, device=q.device)[None, None], 256), positions, None)

    check(attend, q, *kept, positions)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "m"), [("gqa4", 1), ("gqa7", 3), ((40, 40), 1)], ids=str)
def test_decode(heads, m, dtype, kernel):
    kept, prompt, n = 3000, 8000, 8100
    _, k, v = qkv(2, heads, kept + n - prompt + 28, 128, dtype=dtype)
    q = qkv(2, heads, m, 128, dtype=dtype, seed=1)[0]
    where = choose(2, 1, prompt, kept)
    mask = torch.rand(2, 1, 1, n, generator=torch.Generator().manual_seed(2)) > 0.3
    for given in (None, mask):
        check(decode_attention, q, k, v, where, prompt, n, given, kernel=kernel)
    buffers = cuda(k.clone(), v.clone())
    append_tokens(*buffers, *cuda(k[:, :, :m], v[:, :, :m]), kept + n - prompt, kernel)
    for buffer, x in zip(buffers, (k, v), strict=True):
        end = kept + n - prompt
        assert torch.equal(buffer[:, :, end : end + m].cpu(), x[:, :, :m])
        assert torch.equal(buffer[:, :, :end].cpu(), x[:, :, :end])


def test_auto_measures_once_and_remembers(monkeypatch):
    monkeypatch.setattr(fastest, "_winners", {})
    q, k, v = (x.cuda() for x in qkv(1, (8, 8), 2048, 128, dtype=torch.bfloat16))
    positions = choose(1, 1, 2048, 1024).cuda()
    keys, values = gather_kv(k, v, positions)
    first = sparse_attention(q, keys, values, positions)
    (winner,) = fastest.winners().values()
    monkeypatch.setattr(fastest, "measure", lambda *_: pytest.fail(f"measured again, {winner} was known"))
    torch.testing.assert_close(sparse_attention(q, keys, values, positions), first)
