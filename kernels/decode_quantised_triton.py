"""decode_quantised on a GPU: parts of the quantised tokens, beside those of the buffers, for the same join.

Codes are unpacked in registers. Channel d of a token is bits of byte d mod W, so that a load of D channels reads W
neighbouring bytes, 8 / bits times from the first cache; a tile is then like one of full numbers, channel by channel.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.codes import GROUP, bits_of
from zipvl_compile.kernels.common.dispatch import launchable
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.common.tiles import absorb, capped, dot, masked, unit_stride
from zipvl_compile.kernels.decode_attention import Parts, mask_offsets, rows_of_tile, store_part


@triton.jit
def _levels(codes, row, channel, exists, BITS: tl.constexpr, W: tl.constexpr):
    """Load the codes of channels, fp32; `row` and `channel` broadcast to the tile that `exists`."""
    code = tl.load(codes + row * W + channel % W, mask=exists, other=0).to(tl.int32)
    if BITS < 8:
        code = (code >> (channel // W * BITS)) & ((1 << BITS) - 1)
    return code.to(tl.float32)


@triton.jit
def _decode_codes_kernel(
    q, key_codes, key_scales, value_codes, value_scales, others, mask, partial, tops, totals, R, rows, part, first, m,
    scale, softcap, hidden_below, stride_qb, stride_qh, stride_qn, stride_mb, stride_mh, stride_mq, stride_mk,
    D: tl.constexpr, DV: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, FACTOR: tl.constexpr, GROUPS: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr,
    ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of (head, new token) rows over one part of the quantised tokens."""
    split = tl.program_id(0)
    of_head = tl.program_id(1).to(tl.int64)
    b, h = of_head // KV_HEADS, of_head % KV_HEADS
    r, inside, head, token = rows_of_tile(m, FACTOR, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows_q = b * stride_qb + (h * FACTOR + head) * stride_qh + token * stride_qn
    tile = tl.load(q + rows_q[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    key_codes += of_head * rows * (D * KEY_BITS // 8)
    key_scales += of_head * (rows // GROUP) * D * 2
    value_codes += of_head * rows * (DV * VALUE_BITS // 8)
    value_scales += of_head * rows * 2
    others += (b * GROUPS + h * GROUPS // KV_HEADS) * R
    mask += b * stride_mb + h * FACTOR * stride_mh
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = tl.minimum((split + 1) * part, R)
    for start in range(split * part, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        exists = column < end
        wide = column.to(tl.int64)
        own = key_scales + (start // GROUP * D + d) * 2  # a tile lies in one group
        step = tl.load(own, mask=d < D, other=0.0).to(tl.float32)
        zero = tl.load(own + 1, mask=d < D, other=0.0).to(tl.float32)
        there = exists[None, :] & (d < D)[:, None]
        k = _levels(key_codes, wide[None, :], d[:, None], there, KEY_BITS, D * KEY_BITS // 8)
        k = (k * step[:, None] + zero[:, None]).to(tile.dtype)
        scores = capped(dot(tile, k), scale, softcap, CAPPED)  # [BLOCK_M, BLOCK_N]
        pointers = mask
        if MASK != 0:
            where = tl.load(others + column, mask=exists, other=0)
            pointers = mask + mask_offsets(where, head, token, stride_mh, stride_mq, stride_mk, ROW)
        scores = masked(scores, exists[None, :] & inside[:, None], exists, pointers, hidden_below, MASK, ROW)
        step = tl.load(value_scales + wide * 2, mask=exists, other=0.0).to(tl.float32)
        zero = tl.load(value_scales + wide * 2 + 1, mask=exists, other=0.0).to(tl.float32)
        there = exists[:, None] & (dv < DV)[None, :]
        v = _levels(value_codes, wide[:, None], dv[None, :], there, VALUE_BITS, DV * VALUE_BITS // 8)
        v = (v * step[:, None] + zero[:, None]).to(tile.dtype)
        top, total, result = absorb(top, total, result, scores, v)
    row = (of_head * FACTOR * m + r) * SPLITS + first + split
    store_part(partial, tops, totals, top, total, result, row, inside, DV, BLOCK_DV)


def decode_triton(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    key_codes: torch.Tensor, key_scales: torch.Tensor, value_codes: torch.Tensor, value_scales: torch.Tensor,
    mask: torch.Tensor | None, scale: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Return what decode_quantised does, by kernels that are launched, or put into the graph that is traced."""
    q, keys, values = (unit_stride(x) for x in (q, keys, values))
    count = prompt_length - positions.shape[2]
    others = positions if mask is None else torch.ops.zipvl.other_tokens(positions, prompt_length)
    parts = Parts(q, keys, values, sources=2)
    parts.attend(q, keys, values, positions, prompt_length, n, mask, scale, softcap, None)
    common = parts.common(q, keys, values, mask, scale, softcap)
    widths = {"D": int(q.shape[3]), "DV": int(values.shape[3])}
    launchable(_decode_codes_kernel, q)[parts.grid](
        key_codes=key_codes.contiguous(), key_scales=key_scales.contiguous(), value_codes=value_codes.contiguous(),
        value_scales=value_scales.contiguous(), others=others.contiguous(), R=count, rows=key_codes.shape[2],
        part=parts.tokens(count), first=parts.splits, KEY_BITS=bits_of(key_codes, widths["D"]),
        VALUE_BITS=bits_of(value_codes, widths["DV"]), GROUP=GROUP, GROUPS=positions.shape[1], q=q, **common | widths,
    )  # fmt: skip
    return parts.join(q, values)
