"""decode_attention of CPUs: one operator, or operations of a compiled graph, which give the same and copy no cache."""

import pytest
import torch
from torch.profiler import profile

from zipvl_compile.kernels.decode_attention_torch import check, decode_in_graph, empty_output
from zipvl_compile.kernels.ops import ops

B, HEADS, KV_HEADS, D, P, PROMPT, LATER, CAPACITY = 2, 6, 2, 8, 5, 9, 3, 16
N = PROMPT + LATER
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_from_disk():
    """PyTorch's caches know an operator by its name, whatever it was when they were written."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR)


POSITIONS = torch.tensor([[[0, 2, 3, 6, 8]], [[1, 2, 5, 7, 8]]])
OF_HEADS = torch.cat([POSITIONS, POSITIONS.flip(0)], 1)


def masks(m):
    shown = torch.rand(B, HEADS, m, N, generator=GENERATOR) > 0.3
    shown[..., -1] = True
    additive = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    return {
        "none": None, "padding": shown[:, :1, :1], "rows": shown[:, :1], "of each head": shown,
        "additive": additive[:, :1], "additive, of each head": additive,
    }  # fmt: skip


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("positions", [POSITIONS, OF_HEADS], ids=["layer", "heads"])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("mask", masks(1))
def test_a_graph_computes_what_the_operator_does(mask, m, positions, inner):
    q, keys, values = draw(B, HEADS, m, D), draw(B, KV_HEADS, CAPACITY, D), draw(B, KV_HEADS, CAPACITY, 4)
    keys[:, :, P + LATER :], values[:, :, P + LATER :] = float("nan"), float("nan")
    given = (q, keys, values, positions, PROMPT, N, masks(m)[mask], 0.4, None)
    torch._dynamo.reset()

    def step(*given):
        return ops.decode_attention(*given)

    expected = ops.decode_attention_torch(*given)
    got = torch.compile(step, backend=inner, fullgraph=True)(*given)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    assert got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(decode_in_graph(*given, None), expected, rtol=0, atol=0)


def test_a_step_allocates_no_second_cache():
    """A step appends in place, whatever the length, and reads the rows where they are."""
    keys, values = draw(1, 2, 4096, 64), draw(1, 2, 4096, 64)
    positions = torch.arange(2000)[None, None]

    @torch.compile(backend="inductor", dynamic=True)
    def step(q, k, v, n):
        ops.append_tokens(keys, values, k, v, n - 3000)
        return ops.decode_attention(q, keys, values, positions, 4000, n, None, None, None)

    new = draw(1, 8, 1, 64), draw(1, 2, 1, 64), draw(1, 2, 1, 64)
    before = keys.clone()
    for n in (4001, 4002, 4003):
        step(*new, n)
    with profile(profile_memory=True) as seen:
        step(*new, 4004)
    assert torch.equal(keys[:, :, 1004:1005], new[1])
    assert torch.equal(keys[:, :, :1001], before[:, :, :1001]) and torch.equal(keys[:, :, 1005:], before[:, :, 1005:])
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in seen.events())
    assert taken < keys.nbytes / 4, f"{taken:,} bytes"


def test_arguments_are_checked():
    q, keys = draw(B, HEADS, 1, D), draw(B, KV_HEADS, CAPACITY, D)
    check(q, keys, keys, POSITIONS, PROMPT, N, None)
    with pytest.raises(ValueError, match="keys: expected at least 17 cached tokens"):
        check(q, keys, keys, POSITIONS, PROMPT, PROMPT + 12, None)
    assert empty_output(q, keys).shape == (B, HEADS, 1, D)
    assert empty_output(q, keys).transpose(1, 2).is_contiguous()
