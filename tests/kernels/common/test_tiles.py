"""What attention kernels share: one tile after the other is the softmax over all keys; pointers and strides."""

import pytest
import torch
import triton
import triton.language as tl
from support.implementations import triton_only

from zipvl_compile.kernels.common import tiles
from zipvl_compile.kernels.common.tiles import absorb, capped, dot, masked


@triton.jit
def _attend_kernel(
    q, k, v, mask, out, n, scale, softcap, hidden_below, stride_mb, stride_mh, stride_mq, stride_mk,
    CAPPED: tl.constexpr, MASK: tl.constexpr, ROW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of 16 queries over n keys, all of width 16, by one program."""
    i, d = tl.arange(0, 16), tl.arange(0, 16)
    tile = tl.load(q + i[:, None] * 16 + d[None, :])
    top = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    result = tl.zeros([16, 16], tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < n
        keys = tl.load(k + j[None, :] * 16 + d[:, None], mask=inside[None, :], other=0.0)
        scores = capped(dot(tile, keys), scale, softcap, CAPPED)
        pointers = mask + j * stride_mk if ROW else mask + i[:, None] * stride_mq + j[None, :] * stride_mk
        scores = masked(scores, inside[None, :], inside, pointers, hidden_below, MASK, ROW)
        values = tl.load(v + j[:, None] * 16 + d[None, :], mask=inside[:, None], other=0.0)
        top, total, result = absorb(top, total, result, scores, values)
    tl.store(out + i[:, None] * 16 + d[None, :], result * tl.where(total > 0, 1.0 / total, 0.0)[:, None])


@pytest.mark.parametrize("n", [1, 16, 37])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("mask", ["none", "bool", "bool-row", "additive-min", "additive-inf"])
@triton_only
def test_tiles_add_up_to_attention(implementation, mask, softcap, n):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, rows, 16, generator=generator) * 2 for rows in (16, n, n))
    shown = torch.rand(1, 1, 1 if mask == "bool-row" else 16, n, generator=generator) > 0.4
    shown[..., -1] = True
    if mask != "bool-row":
        shown[:, :, 3] = False  # a query that sees nothing
    if mask == "none":
        shown[:] = True
    given = None if mask == "none" else shown
    if mask.startswith("additive"):
        low = float("-inf") if mask == "additive-inf" else torch.finfo(torch.float32).min
        given = torch.randn(shown.shape, generator=generator).masked_fill(~shown, low)
    q_, k_, v_, mask_ = implementation.given(q, k, v, given)
    out = torch.empty_like(q_)
    arguments = tiles.mask_arguments(mask_, q_)
    _attend_kernel[(1,)](
        q_, k_, v_, out=out, n=n, scale=0.3, softcap=softcap or 0.0, CAPPED=softcap is not None, BLOCK_N=16, **arguments
    )
    scores = 0.3 * q.double() @ k.double().transpose(2, 3)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores + (given.double() if mask.startswith("additive") else 0.0)
    expected = torch.softmax(scores.masked_fill(~shown, float("-inf")), -1).nan_to_num(0.0) @ v.double()
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_arguments_of_no_mask():
    q = torch.zeros(1, 2, 3, 4)
    arguments = tiles.mask_arguments(None, q)
    assert arguments["mask"] is q and arguments["MASK"] == tiles.NO_MASK and arguments["ROW"] is True
    assert [arguments[f"stride_m{axis}"] for axis in "bhqk"] == [0] * 4


@pytest.mark.parametrize(
    ("shape", "strides", "row"),
    [
        ((2, 3, 5, 7), [105, 35, 7, 1], False),
        ((2, 1, 1, 7), [7, 0, 0, 1], True),
        ((1, 3, 1, 7), [0, 7, 0, 1], False),
        ((1, 1, 5, 7), [0, 0, 7, 1], False),
    ],
    ids=str,
)
def test_an_axis_that_broadcasts_has_stride_0(shape, strides, row):
    arguments = tiles.mask_arguments(torch.ones(shape, dtype=torch.bool), torch.zeros(2, 3, 5, 4))
    assert [arguments[f"stride_m{axis}"] for axis in "bhqk"] == strides
    assert arguments["MASK"] == tiles.BOOL_MASK and arguments["ROW"] is row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_additive_mask_hides_below_a_value_that_no_bias_has(dtype):
    arguments = tiles.mask_arguments(torch.zeros(1, 1, 5, 7, dtype=dtype), torch.zeros(2, 3, 5, 4))
    assert arguments["MASK"] == tiles.ADDITIVE_MASK
    assert torch.finfo(dtype).min < arguments["hidden_below"] < -1e4
    assert abs(arguments["hidden_below"]) <= 1e38, "also in fp32, as Triton passes it"


def test_strides_by_name():
    x = torch.zeros(2, 3, 5, 7).transpose(1, 2)
    assert tiles.strides(q=x, o=x[0:1]) == {
        "stride_qb": 105, "stride_qh": 7, "stride_qn": 35, "stride_ob": 105, "stride_oh": 7, "stride_on": 35,
    }  # fmt: skip


@pytest.mark.parametrize(("width", "block"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (256, 256)])
def test_head_blocks(width, block):
    assert tiles.head_blocks(width) == block


def test_elements_of_a_head_lie_together():
    x = torch.randn(2, 3, 5, 7)
    apart = x.transpose(2, 3)
    assert tiles.unit_stride(x) is x
    together = tiles.unit_stride(apart)
    assert together.stride(-1) == 1 and torch.equal(together, apart)


@pytest.mark.parametrize(("hip", "stages"), [(None, 3), ("6.4", 2)], ids=["cuda", "hip"])
def test_stages_fit_into_the_shared_memory_of_cdna3(monkeypatch, hip, stages):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert tiles.pipelined(3) == stages and tiles.pipelined(1) == 1
