"""The kernels that copy: gather_tokens, gather_kv and append_tokens, bit for bit."""

import pytest
import torch

from zipvl_compile.kernels.append_tokens import append_tokens
from zipvl_compile.kernels.gather_tokens import gather_kv, gather_tokens


def choose(batch, groups, n, p):
    return torch.rand(batch, groups, n, generator=torch.Generator().manual_seed(n)).argsort(-1)[..., :p].sort(-1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("n", "p"), [(1, 1), (63, 1), (63, 63), (500, 180)])
def test_gather(cases, n, p, groups, dtype):
    _, k, v = cases.qkv(batch=3, n=n, dim=60, value_dim=80, dtype=dtype)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # as models lay it out
    positions = choose(3, groups, n, p)
    keys, values = gather_kv(k, v, positions, 5, "triton")
    for x, out in ((k, keys), (v, values)):
        assert out.shape[2] == p + 5 and out.is_contiguous()
        expected = gather_tokens(x, positions, 0, "torch")
        assert torch.equal(out[:, :, :p], expected)
        assert torch.equal(gather_tokens(x, positions, 0, "triton"), expected)
        assert (out[:, :, p:] == 0).all(), "spare rows are zeros"


def test_a_position_outside_the_prompt_is_seen_at_once(cases):
    _, k, _ = cases.qkv(n=9, dim=8, dtype=torch.float32)
    assert gather_tokens(k, torch.tensor([[[1, 9]]]), 0, "triton")[:, :, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_append(cases, m, dtype):
    _, k, v = cases.qkv(batch=3, n=m, dim=60, value_dim=24, dtype=dtype)
    buffers = [torch.full((3, 2, 30, d), 7.0, dtype=dtype) for d in (60, 24)]
    append_tokens(*buffers, k, v, 6, "triton")
    for buffer, new in zip(buffers, (k, v), strict=True):
        assert torch.equal(buffer[:, :, 6 : 6 + m], new)
        assert (buffer[:, :, :6] == 7).all() and (buffer[:, :, 6 + m :] == 7).all(), "nothing else changes"


def test_append_without_room_writes_nothing(cases):
    _, k, v = cases.qkv(n=3, dim=8, dtype=torch.float32)
    buffers = [torch.zeros(1, 2, 6, 8) for _ in range(2)]
    with pytest.raises(ValueError, match=r"at: expected room for 7 tokens, got 6"):
        append_tokens(*buffers, k, v, 4, "triton")
    assert not any(buffer.any() for buffer in buffers)
