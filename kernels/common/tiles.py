"""What the attention kernels share: scores of one tile, with softcap and mask, in base-2 logarithms.

    s = log2(e) * (cap(scale * q . k) + mask),  -inf where the query does not see the key

A mask comes as a pointer with one stride per axis (0 where it broadcasts), so no mask tensor is ever made.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.language import interpreted, tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2


# Triton's interpreter multiplies the bit patterns of bf16; there, products are taken in fp32, which loses nothing.
WIDEN = tl.constexpr(interpreted())


@triton.jit
def dot(a, b):
    """Return `a [M, K] . b [K, N]` in fp32; fp32 inputs are not rounded to tf32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def as_operand(weights, like):
    """Return fp32 `weights` in the dtype that `dot` needs beside `like`."""
    return weights if WIDEN else weights.to(like.dtype)


@triton.jit
def capped(scores, scale, softcap, CAPPED: tl.constexpr):
    """Return `log2(e) * cap(scale * scores)`; tanh(x) is 2 sigmoid(2x) - 1."""
    scores = scores * tl.cast(scale, tl.float32)  # Inductor passes Python floats as fp64
    if CAPPED:
        softcap = tl.cast(softcap, tl.float32)
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores * LOG2_E


@triton.jit
def masked(scores, shown, inside, mask, hidden_below, MASK: tl.constexpr, ROW: tl.constexpr):
    """Hide and shift a tile of scores.

    Args:
        scores: `[M, N]`, base-2.
        shown: bool, broadcasts to `[M, N]`: what is inside the tensors and causally visible.
        inside: bool `[N]`, which keys exist.
        mask: pointers `[M, N]`, or `[N]` where all queries share a row.
        hidden_below: an additive mask hides below this value.
        MASK: 0 none, 1 bool, 2 additive.
        ROW: all queries of the tile share a row, which is read once.
    """
    if MASK != 0:
        if ROW:
            given = tl.load(mask, mask=inside, other=0)[None, :]
        else:
            given = tl.load(mask, mask=shown & inside[None, :], other=0)
        if MASK == 1:
            shown = shown & (given != 0)
        else:
            given = given.to(tl.float32)
            shown = shown & (given > tl.cast(hidden_below, tl.float32))
            scores = scores + given * LOG2_E
    return tl.where(shown, scores, float("-inf"))


@triton.jit
def absorb(top, total, result, scores, values):
    """Take a tile of keys into an online softmax: maximum, sum and weighted values of each query so far."""
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - base[:, None])  # [M, N]
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    return new, total, result * shrink[:, None] + dot(as_operand(weights, values), values)


def mask_arguments(mask: torch.Tensor | None, q: torch.Tensor) -> dict:
    """Return the kernel arguments of `mask [B or 1, Hq or 1, queries or 1, keys]`: pointer, strides and kind.

    An axis that broadcasts has stride 0; the mask itself is passed as it is, since a compiler that sees an expanded
    tensor is free to lay it out in another way. `ROW` says that the queries of all heads share one row.
    """
    if mask is None:
        steps, low, kind = [0] * 4, 0.0, NO_MASK
    else:
        steps = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
        low = 0.0 if kind == BOOL_MASK else max(torch.finfo(mask.dtype).min / 2, -1e38)
    arguments = {f"stride_m{axis}": step for axis, step in zip("bhqk", steps, strict=True)}
    row = mask is None or (mask.shape[1] == 1 and mask.shape[2] == 1)
    return arguments | {"mask": q if mask is None else mask, "hidden_below": low, "MASK": kind, "ROW": row}


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Return the kernel arguments `stride_NAMEb`, `stride_NAMEh` and `stride_NAMEn` of `[B, H, n, D]` tensors."""
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bhn")}


def head_blocks(width: int) -> int:
    """Return the tile width for a head of `width` elements: the next power of two, at least 16, as tl.dot wants it."""
    return max(triton.next_power_of_2(width), 16)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with elements of a head next to each other, which nearly every model gives."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pipelined(stages: int) -> int:
    """Return the software pipeline's depth; AMD's CDNA3 has 64 KiB of shared memory, where two stages fit."""
    return min(stages, 2) if torch.version.hip else stages
