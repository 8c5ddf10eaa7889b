"""decode_quantised in plain PyTorch: what runs on CPUs, as one operator, or as operations of the compiled graph.

    q . k = sum_d (q_d scale_d) code_d + q . zero,      sum_i w_i v_i = sum_i (w_i scale_i) code_i + sum_i w_i zero_i

The operator dequantises some groups of tokens at a time and joins what each of them gives. In a graph, one new token
takes matrix products with the codes themselves, which are unpacked once for all query heads of a KV head, a layer at a
time; sums that unpack while they add took two to eight times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zipvl_compile.kernels.common.checks import fail, per_head
from zipvl_compile.kernels.common.codes import GROUP, check_codes, chunks, planes
from zipvl_compile.kernels.common.log_sum_exp import added, joined, with_lse
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.decode_attention_torch import check as check_cache
from zipvl_compile.kernels.decode_attention_torch import empty_output
from zipvl_compile.kernels.other_tokens import other_tokens
from zipvl_compile.kernels.token_positions import cached_count, cached_positions

NAME = "decode_quantised"


def check(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    key_codes: torch.Tensor, key_scales: torch.Tensor, value_codes: torch.Tensor, value_scales: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:  # fmt: skip
    """Check the arguments of decode_quantised.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_cache(q, keys, values, positions, prompt_length, n, mask, NAME)
    others = prompt_length - positions.shape[2]
    if others < 0:
        fail(NAME, "positions", f"at most {prompt_length} kept tokens, the prompt", positions.shape[2], "Check them.")
    check_codes(NAME, "key_codes", key_codes, key_scales, keys, others, ("channel",))
    check_codes(NAME, "value_codes", value_codes, value_scales, values, others, ("token",))


@torch.library.custom_op("zipvl::decode_quantised_torch", mutates_args=())
def _decode_torch(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    key_codes: torch.Tensor, key_scales: torch.Tensor, value_codes: torch.Tensor, value_scales: torch.Tensor,
    mask: torch.Tensor | None, scale: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    check(q, keys, values, positions, prompt_length, n, key_codes, key_scales, value_codes, value_scales, mask)
    if q.numel() == 0:
        return empty_output(q, values)
    out, lse = _attend_cached(q, keys, values, positions, prompt_length, n, mask, scale, softcap)
    others = None if mask is None else other_tokens(positions, prompt_length)
    parts = (key_codes, key_scales, q.shape[3]), (value_codes, value_scales, values.shape[3])
    for rows, (k, v) in chunks(*parts, tokens=prompt_length - positions.shape[2]):
        bias = None if mask is None or others is None else _at(mask, q, others[:, :, rows])
        part, part_lse = with_lse(q, k, v, bias, False, scale, softcap)
        out, lse = joined(out, lse, part, part_lse), torch.logaddexp(lse, part_lse)
    return empty_output(q, values).copy_(out)


@_decode_torch.register_fake
def _(
    q, keys, values, positions, prompt_length, n, key_codes, key_scales, value_codes, value_scales, mask, scale, softcap
):
    return empty_output(q, values)


def _attend_cached(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    mask: torch.Tensor | None, scale: float | None, softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend to what the buffers hold, see `with_lse`."""
    length = cached_count(positions, prompt_length, n)
    bias = None if mask is None else _at(mask, q, cached_positions(positions, prompt_length, n))
    return with_lse(q, keys[:, :, :length], values[:, :, :length], bias, False, scale, softcap)


def _at(mask: torch.Tensor, q: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the columns of a mask where tokens stand, int64 `[B, G, R]`: `[B, 1 or Hq, m or 1, R]`."""
    batch, heads = q.shape[:2]
    return take(mask, batch, None, where if where.shape[1] == 1 else per_head(where, heads))


def decode_in_graph(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    key_codes: torch.Tensor, key_scales: torch.Tensor, value_codes: torch.Tensor, value_scales: torch.Tensor,
    mask: torch.Tensor | None, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Return what decode_quantised does for one new token, by operations that are traced one by one."""
    out, lse = _attend_cached(q, keys, values, positions, prompt_length, n, mask, scale, None)
    (batch, heads, _, width), kv_heads, rows, width_v = q.shape, keys.shape[1], key_codes.shape[2], values.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    new = q.to(wide).reshape(batch, kv_heads, 1, -1, width) * (width**-0.5 if scale is None else scale)
    step, zero = key_scales.to(wide)[:, :, :, None].unbind(-1)  # [B, Hkv, S, 1, D]
    levels = _levels(key_codes, width, wide).unflatten(2, (key_scales.shape[2], GROUP))
    scores = (new * step) @ levels.transpose(-1, -2) + (new * zero).sum(-1, keepdim=True)  # [B, Hkv, S, F, 64]
    scores = scores.transpose(2, 3).flatten(3)
    others = prompt_length - positions.shape[2]
    if mask is not None:
        where = F.pad(other_tokens(positions, prompt_length), (0, rows - others))
        bias = added(_at(mask, q, where), wide).expand(batch, heads, 1, rows)
        scores = scores + bias.reshape(batch, kv_heads, heads // kv_heads, rows)
    scores = scores.masked_fill(torch.arange(rows, device=q.device) >= others, float("-inf"))
    part_lse = scores.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(wide).min)  # [B, Hkv, F, 1]
    weights = (scores - part_lse).exp()
    step, zero = value_scales.to(wide)[:, :, None, :, 0].unbind(-1)  # [B, Hkv, 1, R']
    part = (weights * step) @ _levels(value_codes, width_v, wide) + (weights * zero).sum(-1, keepdim=True)
    part, part_lse = part.reshape(batch, heads, 1, width_v), part_lse.reshape(batch, heads, 1, 1)
    whole = joined(out, lse, part, part_lse).to(q.dtype)
    return whole.transpose(1, 2).contiguous().transpose(1, 2)


def _levels(codes: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the codes themselves as numbers, `[B, Hkv, R', D]`."""
    return torch.cat([plane.to(dtype) for plane in planes(codes, width)], -1)
