"""Chosen tokens of a layer's keys or values at 8, 4 or 2 bits.

    out[b, h, i] ~ x[b, h, positions[b, g(h), i]]        i < R;  the last of them again in the rows up to a full group

Keys have few channels of large magnitude, so that a channel of 64 neighbouring tokens shares a scale; the channels of
values are alike, and a token has one. `common/codes.py` says how numbers become codes.

Source: ZipVL (arXiv 2410.08584), low bits for less important tokens; KIVI (arXiv 2402.02750), what shares a scale.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import check_positions, fail
from zipvl_compile.kernels.common.codes import BITS, GROUP, groups_of, quantised, tokens_at_a_time
from zipvl_compile.kernels.common.token_copies import take_rows


@torch.library.custom_op("zipvl::quantise_tokens", mutates_args=())
def _quantise_tokens(
    x: torch.Tensor, positions: torch.Tensor, bits: int, per: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, positions, bits, per)
    codes, scales = _empty(x, positions, bits, per)
    (batch, heads, _, width), count, padded = x.shape, positions.shape[2], codes.shape[2]
    if x.numel() == 0 or count == 0:
        return codes, scales
    step = tokens_at_a_time(x, batch * heads * width)
    for start in range(0, padded, step):
        rows = torch.arange(start, min(start + step, padded), device=x.device).clamp_(max=count - 1)
        chosen = x.new_empty(batch, heads, rows.numel(), width)
        chosen = take_rows(x, positions.index_select(2, rows), chosen).unflatten(2, (-1, GROUP))
        part, of_part = quantised(chosen, bits, 3 if per == "channel" else 4)  # [B, H, groups, 64 or 1, D or 1, 2]
        codes[:, :, start : start + step] = part.flatten(2, 3)
        own = slice(start // GROUP, (start + step) // GROUP) if per == "channel" else slice(start, start + step)
        scales[:, :, own] = of_part.flatten(2, 3)
    return codes, scales


def _check(x: torch.Tensor, positions: torch.Tensor, bits: int, per: str) -> None:
    name = "quantise_tokens"
    if x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}"
        fail(name, "x", "a floating-point [batch, heads, tokens, head_dim] tensor", got, "Pass keys or values.")
    check_positions(name, positions, x.shape[0], x.shape[1])
    if bits not in BITS:
        fail(name, "bits", "8, 4 or 2", bits, "Choose one of them.")
    if per not in ("channel", "token"):
        fail(name, "per", '"channel" or "token"', repr(per), 'Use "channel" for keys, "token" for values.')
    if x.shape[3] % (8 // bits) != 0:
        remedy = "Take more bits, or keep this layer whole."
        fail(name, "x", f"a head_dim that {8 // bits} divides, to fill bytes of {bits} bits", x.shape[3], remedy)


def _empty(x: torch.Tensor, positions: torch.Tensor, bits: int, per: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _, width = x.shape
    groups = groups_of(positions.shape[2])
    codes = x.new_empty(batch, heads, groups * GROUP, width * bits // 8, dtype=torch.uint8)
    own = (groups, width) if per == "channel" else (groups * GROUP, 1)
    return codes, x.new_empty(batch, heads, *own, 2)


@_quantise_tokens.register_fake
def _(x, positions, bits, per):
    return _empty(x, positions, bits, per)


def quantise_tokens(x: torch.Tensor, positions: torch.Tensor, bits: int, per: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens at `positions`, quantised.

    Args:
        x: keys or values `[B, H, n, D]`; a byte holds `8 / bits` channels, and `D` divides into that many.
        positions: int64 `[B, G, R]`, each in [0, n); `G` divides `H`.
        bits: 8, 4 or 2.
        per: what has a scale: "channel", of 64 neighbouring tokens of the list, or "token".

    Returns:
        codes uint8 `[B, H, R', D * bits / 8]`, where R' is R rounded up to a multiple of 64; scale and zero in the
        dtype of x, `[B, H, R' / 64, D, 2]` by channel or `[B, H, R', 1, 2]` by token.

    Raises:
        ValueError: shapes, dtypes, bits or a rule that do not fit.
    """
    return torch.ops.zipvl.quantise_tokens(x, positions, bits, per)
