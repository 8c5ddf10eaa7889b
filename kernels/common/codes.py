"""Quantised numbers of 8, 4 or 2 bits, packed into bytes, and back.

    x ~ code * scale + zero,      scale = (max - min) / (2^bits - 1),  zero = min  of what shares them

Packing is planar: byte j of a token holds, in its bits from low to high, channels j, j + W, j + 2W, ..., where W bytes
hold a token. So one shift and one mask give W neighbouring channels, and nothing is interleaved.

Source: KIVI (arXiv 2402.02750), asymmetric quantisation of keys by channel and of values by token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zipvl_compile.kernels.common.checks import fail

GROUP = 64  # neighbouring tokens of a list that share the scale of a channel
BITS = (8, 4, 2)
# Numbers in full at a time: on a CPU what stays in its caches; elsewhere a launch costs more than memory.
MOST = 1 << 18
MOST_ELSEWHERE = 1 << 24
_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def groups_of(tokens: int) -> int:
    """Return how many groups hold so many tokens, the last of them perhaps not full."""
    return (tokens + GROUP - 1) // GROUP


def tokens_at_a_time(x: torch.Tensor, numbers: int) -> int:
    """Return how many tokens of so many numbers are taken at a time, on the device of x: full groups."""
    most = MOST if x.device.type == "cpu" else MOST_ELSEWHERE
    return max(most // max(numbers, 1) // GROUP, 1) * GROUP


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
    codes = ((wide - zero) / scale.to(wide.dtype)).round_()
    codes = codes.nan_to_num_(0.0).clamp_(0, most)  # where all are equal it is 0 / 0; no integer is what NaN becomes
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


def chunks(
    *parts: tuple[torch.Tensor, torch.Tensor, int], tokens: int
) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """Dequantise some groups at a time, so that what is alive at once is bounded.

    Args:
        parts: codes, scales and width, see `dequantised`, of the same tokens.
        tokens: how many of the rows are real.

    Yields:
        which rows, and of each part what they stand for, `[B, H, rows, D]`.
    """
    first = parts[0][0]
    step = tokens_at_a_time(first, first.shape[0] * first.shape[1] * max(width for *_, width in parts))
    for start in range(0, tokens, step):
        rows, every = slice(start, min(start + step, tokens)), slice(start, start + step)
        found = []
        for codes, scales, width in parts:
            own = every if scales.shape[2] == codes.shape[2] else slice(start // GROUP, every.stop // GROUP)
            whole = dequantised(codes[:, :, every], scales[:, :, own], width)
            found.append(whole[:, :, : rows.stop - start])
        yield rows, tuple(found)


def check_codes(
    operator: str, name: str, codes: torch.Tensor, scales: torch.Tensor, like: torch.Tensor, tokens: int,
    per: tuple[str, ...] = ("channel", "token"),
) -> None:  # fmt: skip
    """Check codes and scales of so many tokens, whose full numbers would be as those of `like [B, H, *, D]`.

    Args:
        name: of the codes, for errors.
        per: what may have a scale.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    (batch, heads, _, width), groups = like.shape, groups_of(tokens)
    bytes_ = [width * bits // 8 for bits in BITS if width % (8 // bits) == 0]
    remedy = "Pass what quantise_tokens returned."
    if codes.dtype != torch.uint8 or codes.dim() != 4 or codes.shape[3] not in bytes_:
        got = f"{codes.dtype} {list(codes.shape)}"
        wanted = " or ".join(map(str, bytes_))
        fail(operator, name, f"a uint8 [batch, heads, tokens, bytes] tensor of {wanted} bytes a token", got, remedy)
    rows = [batch, heads, groups * GROUP]
    if list(codes.shape[:3]) != rows:
        fail(operator, name, f"batch, heads and tokens {rows}", list(codes.shape[:3]), remedy)
    shapes = {"channel": [batch, heads, groups, width, 2], "token": [*rows, 1, 2]}
    if scales.dtype != like.dtype or list(scales.shape) not in [shapes[one] for one in per]:
        wanted = " or ".join(str(shapes[one]) for one in per)
        got = f"{scales.dtype} {list(scales.shape)}"
        fail(operator, f"scales of {name}", f"{like.dtype} {wanted}", got, remedy)
    if not codes.device == scales.device == like.device:
        fail(operator, name, f"device {like.device}", f"{codes.device}, {scales.device}", "Move all to one device.")
