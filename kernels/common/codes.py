"""Quantised numbers of 8, 4 or 2 bits, packed into bytes, and back.

    x ~ code * scale + zero,      scale = (max - min) / (2^bits - 1),  zero = min  of what shares them

Packing is planar: byte j of a token holds, in its bits from low to high, channels j, j + W, j + 2W, ..., where W bytes
hold a token. So one shift and one mask give W neighbouring channels, and nothing is interleaved.

Source: KIVI (arXiv 2402.02750), asymmetric quantisation of keys by channel and of values by token.
"""

from __future__ import annotations

import torch

GROUP = 64  # neighbouring tokens of a list that share the scale of a channel
BITS = (8, 4, 2)
_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def groups_of(tokens: int) -> int:
    """Return how many groups hold so many tokens, the last of them perhaps not full."""
    return (tokens + GROUP - 1) // GROUP


def quantised(x: torch.Tensor, bits: int, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `x [.., D]`, where what differs along `axis` alone shares a scale.

    A scale is rounded up to the dtype of x, so that its codes reach the maximum. What shares a scale with a number that
    is not finite becomes NaN.

    Returns:
        codes uint8 `[.., D * bits / 8]`; scale and zero `[.., D or 1, 2]`, of size 1 along `axis`, in the dtype of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    most = 2**bits - 1
    zero, top = wide.aminmax(dim=axis, keepdim=True)
    exact = (top - zero) / most
    scale = exact.to(x.dtype)
    above = scale.view(_AS_INTEGER[x.element_size()]).add(1).view(x.dtype)
    scale = torch.where(scale < exact, above, scale)
    step = scale.to(wide.dtype)
    codes = ((wide - zero) / step.masked_fill(step == 0, 1.0)).round_().nan_to_num_(0.0).clamp_(0, most)
    return packed(codes.to(torch.uint8), bits), torch.stack((scale, zero.to(x.dtype)), -1)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes below `2 ** bits`, uint8 `[.., D]`, into bytes `[.., D * bits / 8]`."""
    first, *others = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    out = first.clone()
    for i, plane in enumerate(others, 1):
        out |= plane << (bits * i)
    return out


def planes(codes: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Return the codes of neighbouring channels, `8 / bits` tensors int32 `[.., W]`, from bytes uint8 `[.., W]`."""
    bits = bits_of(codes, width)
    wide = codes.to(torch.int32)
    return [(wide >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]


def bits_of(codes: torch.Tensor, width: int) -> int:
    """Return how many bits of the bytes `[.., W]` are a channel's, of `width` channels."""
    return 8 * codes.shape[-1] // width


def dequantised(codes: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """Return what codes stand for.

    Args:
        codes: uint8 `[B, H, R, D * bits / 8]`.
        scales: scale and zero of each channel and group, `[B, H, R / 64, D, 2]`, or of each token, `[B, H, R, 1, 2]`.
        width: D.

    Returns:
        `[B, H, R, D]` in the dtype of the scales.
    """
    wide = torch.promote_types(scales.dtype, torch.float32)
    if codes.shape[2] == 0:
        return scales.new_empty(*codes.shape[:3], width)
    levels = torch.cat(planes(codes, width), -1).unflatten(2, (scales.shape[2], -1))  # [B, H, groups, tokens, D]
    scale, zero = scales.to(wide)[:, :, :, None].unbind(-1)
    return (levels * scale + zero).to(scales.dtype).flatten(2, 3)
