"""decode_attention in plain PyTorch: what runs on CPUs, as one operator, or as operations of the compiled graph.

In a graph Inductor computes masks and views together with what is around them, and no call of ours stands between: on a
small model that is a third of a decode step.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import check_attention_inputs, check_mask, check_positions, fail, per_head
from zipvl_compile.kernels.common.dense_attention import dense_attention
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.token_positions import cached_count, cached_positions


def check(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    mask: torch.Tensor | None, operator: str = "decode_attention",
) -> None:  # fmt: skip
    """Check the arguments of decode_attention, or those that another operator shares with it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_positions(operator, positions, q.shape[0], keys.shape[1])
    length = cached_count(positions, prompt_length, n)
    if not 0 < length <= keys.shape[2]:
        fail(operator, "keys", f"at least {length} cached tokens", keys.shape[2], "Append first.")
    check_attention_inputs(operator, q, keys[:, :, :length], values[:, :, :length])
    check_mask(operator, mask, q, q.shape[2], n)


def empty_output(q: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return memory for the output of queries `[B, Hq, m, D]`, token by token: `[B, Hq, m, Dv]`."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], values.shape[3]).transpose(1, 2)


@torch.library.custom_op("zipvl::decode_attention_torch", mutates_args=())
def _decode_torch(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    mask: torch.Tensor | None, scale: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    check(q, keys, values, positions, prompt_length, n, mask)
    if q.numel() == 0:
        return empty_output(q, values)
    return decode_in_graph(q, keys, values, positions, prompt_length, n, mask, scale, softcap, None)


@_decode_torch.register_fake
def _(q, keys, values, positions, prompt_length, n, mask, scale, softcap):
    return empty_output(q, values)


def decode_in_graph(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    mask: torch.Tensor | None, scale: float | None, softcap: float | None, held: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return what decode_attention does, by operations that are traced one by one.

    Where only the device knows how many rows are in use, all are read, and those to come, finite numbers, are hidden.
    """
    (batch, heads, m, width), kv_heads = q.shape, keys.shape[1]
    factor, shown = heads // kv_heads, None
    if held is None:
        length = cached_count(positions, prompt_length, n)
        keys, values = keys[:, :, :length], values[:, :, :length]
    else:
        shown = (torch.arange(keys.shape[2], device=q.device) < held).expand(batch, 1, 1, -1)  # [B, 1, 1, C]
    if mask is not None:
        where = cached_positions(positions, prompt_length, n) if held is None else positions.clamp(max=n - 1)
        where = where if where.shape[1] == 1 or mask.shape[1] == 1 else per_head(where, heads)
        bias = take(mask, batch, None, where)  # [B, 1 or G or Hq, m or 1, C]
        if shown is not None:
            bias = bias & shown if bias.dtype == torch.bool else bias.masked_fill(~shown, float("-inf"))
        shown = bias
    if shown is not None and shown.shape[1] == heads > kv_heads:
        shown = shown.expand(-1, -1, m, -1).reshape(batch, kv_heads, factor * m, -1)
    elif shown is not None and shown.shape[2] > 1:
        shown = shown.repeat(1, 1, factor, 1)
    packed = q.reshape(batch, kv_heads, factor * m, width)  # the queries of a KV head share one pass over its keys
    out = dense_attention(packed, keys, values, shown, False, scale, softcap).reshape(batch, heads, m, values.shape[3])
    return out.transpose(1, 2).contiguous().transpose(1, 2)
