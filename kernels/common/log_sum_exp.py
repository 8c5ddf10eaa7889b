"""Dense attention with the log-sum-exp of each row, so that parts of one softmax can be joined."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zipvl_compile.kernels.common.dense_attention import soft_capped
from zipvl_compile.kernels.common.masks import visible as shown_by
from zipvl_compile.kernels.common.private import FLASH_ON_CPU


def only(mask: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Return `mask` with everything outside `shown` hidden for certain: False, or -inf."""
    return shown if mask.dtype == torch.bool else torch.where(shown, mask, float("-inf"))


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a bool or additive mask as an additive one, in `dtype`."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool,
    scale: float | None, softcap: float | None, none_blind: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return `dense_attention` and the log of the sum of its exponentials, `[B, Hq, m, 1]` in fp32 (fp64 for fp64).

    A query that sees nothing gets zeros and the lowest finite number; `none_blind` says that there is none. `is_causal`
    may come beside `mask`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    lowest, scale = torch.finfo(dtype).min, q.shape[3] ** -0.5 if scale is None else scale
    bias = mask
    if mask is not None:
        if is_causal:
            mask = only(mask, shown_by(mask) & torch.ones(q.shape[2], k.shape[2], device=q.device).tril().bool())
        bias = added(mask, q.dtype)
    if softcap is None and q.device.type == "cpu":
        widest = max(q.shape[3], v.shape[3])
        same = [x if x.shape[3] == widest else F.pad(x, (0, widest - x.shape[3])) for x in (q, k, v)]
        if mask is None and not is_causal:  # the rows of a KV head's queries as one matrix: larger tiles
            same[0] = same[0].reshape(q.shape[0], k.shape[1], -1, widest)
        out, lse = FLASH_ON_CPU(*same, 0.0, is_causal and mask is None, attn_mask=bias, scale=scale)
        out, lse = (x.reshape(*q.shape[:3], -1) for x in (out, lse))
        if mask is not None and not none_blind:
            lse = lse.masked_fill(~shown_by(mask).any(-1, keepdim=True), lowest)
        return out[..., : v.shape[3]], lse
    factor, parts = q.shape[1] // k.shape[1], []
    if is_causal and mask is None:
        bias = torch.ones(q.shape[2], k.shape[2], device=q.device).tril().log()[None, None]
    for head in range(k.shape[1]):  # one KV head at a time: bounded memory
        heads = slice(head * factor, (head + 1) * factor)
        scores = (q[:, heads].to(dtype) * scale) @ k[:, head, None].to(dtype).transpose(-1, -2)  # [B, factor, m, n]
        scores = soft_capped(scores, softcap)
        if bias is not None:
            scores = scores + (bias if bias.shape[1] == 1 else bias[:, heads])
        lse = scores.logsumexp(-1, keepdim=True).clamp(min=lowest)
        parts.append(((scores - lse).exp() @ v[:, head, None].to(dtype), lse))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1).to(q.dtype), torch.cat(lses, 1)


def joined(a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor) -> torch.Tensor:
    """Return one softmax over disjoint keys: `a + sigmoid(lse_b - lse_a) (b - a)`, in the dtype of the log-sum-exps."""
    return torch.lerp(a.to(a_lse.dtype), b.to(a_lse.dtype), torch.sigmoid(b_lse - a_lse))
