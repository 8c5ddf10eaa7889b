"""Caches whose other prompt tokens are quantised, and in float64 what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from support import cases

from zipvl_compile.kernels.other_tokens import other_tokens
from zipvl_compile.kernels.quantise_tokens import quantise_tokens


def by_hand(codes: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """Return what codes stand for in float64, one channel after the other: `[B, H, R', D]`."""
    bytes_ = codes.shape[3]
    bits = 8 * bytes_ // width
    out = torch.empty(*codes.shape[:3], width, dtype=torch.float64)
    for channel in range(width if codes.shape[2] else 0):
        code = codes[..., channel % bytes_].long() // 2 ** (bits * (channel // bytes_)) % 2**bits
        shared = scales.double()[:, :, :, channel % scales.shape[3]]  # [B, H, groups or R', 2]
        shared = shared.repeat_interleave(codes.shape[2] // scales.shape[2], 2)
        out[..., channel] = code * shared[..., 0] + shared[..., 1]
    return out


def in_place(full: torch.Tensor, positions: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float64 `[B, H, n, D]`: `full`, with what codes stand for at int64 `positions [B, G, R]`."""
    out, rows = full.double(), by_hand(codes, scales, full.shape[3])
    batch, heads, groups = *full.shape[:2], positions.shape[1]
    for b in range(batch):
        for h in range(heads):
            where = positions[b, h * groups // heads]
            out[b, h, where] = rows[b, h, : len(where)]
    return out


@dataclass
class QuantisedCache:
    """Arguments of decode_quantised, and in float64 the keys and values of all logical tokens.

    Attributes:
        given: by name, all but scale and softcap.
        k, v: `[B, Hkv, n, D]` and `[B, Hkv, n, Dv]`.
    """

    given: dict[str, Any]
    k: torch.Tensor
    v: torch.Tensor


def masks(kind: str, batch: int, heads: int, m: int, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor | None:
    """Return a mask over n tokens, of which every query sees the last: "none", "row", "rows", "heads", "min", "inf"."""
    if kind == "none":
        return None
    shape = {"row": (batch, 1, 1), "rows": (1, 1, m), "heads": (batch, heads, 1)}.get(kind, (batch, heads, m))
    shown = torch.rand(*shape, n, generator=torch.Generator().manual_seed(seed)) > 0.3
    shown[..., -1] = True
    if kind not in ("min", "inf"):
        return shown
    bias = torch.rand(shown.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return bias.masked_fill(~shown, torch.finfo(dtype).min if kind == "min" else -torch.inf)


def cache(
    batch: int = 2, heads: Any = "gqa4", groups: int = 1, kept: int = 20, others: int = 70, later: int = 3, m: int = 1,
    dim: int = 16, value_dim: int = 24, key_bits: int = 4, value_bits: int = 4, mask: str = "none",
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> QuantisedCache:  # fmt: skip
    """Return a cache of `kept + others` prompt tokens and `later` ones; what nobody may read is NaN."""
    prompt, n = kept + others, kept + others + later
    _, k, v = cases.qkv(batch, heads, n, dim, value_dim, dtype, seed)
    q = cases.qkv(batch, heads, m, dim, dtype=dtype, seed=seed + 1)[0]
    positions = cases.choose(batch, groups, prompt, kept, seed)
    outside = other_tokens(positions, prompt)
    given: dict[str, Any] = {"q": q}
    for name, x in (("keys", k), ("values", v)):
        index = positions.repeat_interleave(x.shape[1] // groups, 1)[..., None].expand(-1, -1, -1, x.shape[3])
        spare = x.new_full((*x.shape[:2], 3, x.shape[3]), float("nan"))
        given[name] = torch.cat([x.gather(2, index), x[:, :, prompt:], spare], 2)
    given |= {"positions": positions, "prompt_length": prompt, "n": n}
    given |= dict(zip(("key_codes", "key_scales"), quantise_tokens(k, outside, key_bits, "channel"), strict=True))
    given |= dict(zip(("value_codes", "value_scales"), quantise_tokens(v, outside, value_bits, "token"), strict=True))
    given["mask"] = masks(mask, batch, q.shape[1], m, n, dtype, seed)
    full = [
        in_place(x, outside, given[f"{name}_codes"], given[f"{name}_scales"]) for name, x in (("key", k), ("value", v))
    ]
    given["value_scales"][:, :, others:] = float("nan")
    return QuantisedCache(given, *full)
