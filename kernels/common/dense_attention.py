"""Dense attention over tokens that were already chosen, the last step of prefill and decode.

    o = softmax(cap(scale * q . k^T) + mask) v,      cap(s) = softcap * tanh(s / softcap), or s without a softcap

PyTorch's scaled_dot_product_attention computes it, except for the softcap (Gemma 2), which it does not have.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zipvl_compile.kernels.common.masks import visible

# Not cuDNN, which builds a plan, for tens of milliseconds, at every length that it meets.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def soft_capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Return `softcap * tanh(scores / softcap)`, or the scores themselves where there is no softcap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend from `q [B, Hq, m, D]` to `k [B, Hkv, n, D]`, `v [B, Hkv, n, Dv]`; return `[B, Hq, m, Dv]`.

    `mask` is bool or additive, `[B or 1, Hq or 1, m or 1, n]`, and excludes `is_causal`. A query that sees nothing
    gets zeros.
    """
    factor = q.shape[1] // k.shape[1]
    if softcap is None:
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        if q.is_cuda and mask is not None and factor > 1:  # the only kernel there that takes a mask wants equal heads
            k, v = (x.repeat_interleave(factor, 1) for x in (k, v))
        with sdpa_kernel(_BACKENDS) if q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=bool(q.shape[1] != k.shape[1])
            )
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    out = []
    for head in range(k.shape[1]):  # one KV head at a time: bounded memory
        heads = slice(head * factor, (head + 1) * factor)
        scores = (q[:, heads].to(dtype) * scale) @ k[:, head, None].to(dtype).transpose(-1, -2)  # [B, factor, m, n]
        scores = soft_capped(scores, softcap)
        if mask is not None:
            part = mask if mask.shape[1] == 1 else mask[:, heads]
            shown = visible(part)
            scores = (scores if part.dtype == torch.bool else scores + part).masked_fill(~shown, float("-inf"))
            weights = torch.softmax(scores, -1).masked_fill(~shown.any(-1, keepdim=True), 0.0)
        else:
            weights = torch.softmax(scores, -1)
        out.append((weights @ v[:, head, None].to(dtype)).to(q.dtype))
    return torch.cat(out, 1)
