"""Attention of new tokens over the compacted cache, and the append that precedes it.

    keys = [K[T]; later keys],  the i-th of them at logical position  T_i  for i < P,  prompt + i - P  after that
    o = softmax(cap(scale * q . keys^T) + mask[:, positions]) values

The buffer has spare rows, so appending writes the new tokens in place and copies nothing.

Source: ZipVL (arXiv 2410.08584), decoding over the KV cache of important tokens.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.checks import check_attention_inputs, check_mask, check_positions, fail, per_head
from zipvl_compile.kernels.dense_attention import dense_attention
from zipvl_compile.kernels.masks import take


def cached_positions(positions: torch.Tensor, prompt: int, n: int) -> torch.Tensor:
    """Return where every cached token stands in the sequence.

    Args:
        positions: int64 `[B, G, P]` of the kept prompt tokens.
        prompt: prompt length in tokens.
        n: logical length in tokens.

    Returns:
        int64 `[B, G, P + n - prompt]`, ascending.
    """
    later = torch.arange(prompt, n, device=positions.device).expand(*positions.shape[:2], -1)
    return torch.cat([positions, later], dim=2)


@torch.library.custom_op("zipvl::append_tokens", mutates_args=("keys", "values"))
def _append_tokens(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int, kernel: str = "auto"
) -> None:
    for name, buffer, new in (("k", keys, k), ("v", values, v)):
        expected = (*buffer.shape[:2], k.shape[2], buffer.shape[3])
        if tuple(new.shape) != expected or new.dtype != buffer.dtype:
            got = f"{new.dtype} {list(new.shape)}"
            fail("append_tokens", name, f"{buffer.dtype} {list(expected)}, like the buffer", got, "Check the cache.")
    end = at + k.shape[2]
    if at < 0:
        fail("append_tokens", "at", "a row of the buffer", at, "Count the cached tokens.")
    if end > keys.shape[2] or end > values.shape[2]:
        fail("append_tokens", "at", f"room for {end} tokens", keys.shape[2], "Grow the buffer first.")
    keys[:, :, at:end].copy_(k)
    values[:, :, at:end].copy_(v)


@_append_tokens.register_fake
def _(keys, values, k, v, at, kernel="auto"):
    return None


def append_tokens(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int, kernel: str = "auto"
) -> None:
    """Write new tokens into the cache buffers, in place.

    Args:
        keys, values: buffers `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`.
        k, v: new tokens `[B, Hkv, m, D]` and `[B, Hkv, m, Dv]`.
        at: first row to write, in tokens.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Raises:
        ValueError: the buffers have no room; nothing was written then.
    """
    torch.ops.zipvl.append_tokens(keys, values, k, v, at, kernel)


@torch.library.custom_op("zipvl::decode_attention", mutates_args=())
def _decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    prompt: int,
    n: int,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    kernel: str = "auto",
) -> torch.Tensor:
    batch, heads, m, _ = q.shape
    kv_heads = keys.shape[1]
    check_positions("decode_attention", positions, batch, kv_heads)
    length = positions.shape[2] + n - prompt
    if not 0 < length <= keys.shape[2]:
        fail("decode_attention", "keys", f"at least {length} cached tokens", keys.shape[2], "Append first.")
    k, v = keys[:, :, :length], values[:, :, :length]
    check_attention_inputs("decode_attention", q, k, v)
    check_mask("decode_attention", mask, q, m, n)
    out = _empty_output(q, values)
    if out.numel() == 0:
        return out
    if mask is None:
        # Every new token sees the whole cache, so the queries of one KV head can share one pass over it.
        packed = q.reshape(batch, kv_heads, heads // kv_heads * m, q.shape[3])
        result = dense_attention(packed, k, v, None, False, scale, softcap)
        return out.copy_(result.view(batch, heads, m, v.shape[3]))
    where = cached_positions(positions, prompt, n)
    where = where if where.shape[1] == 1 else per_head(where, heads)
    bias = take(mask, batch, None, where)  # [B, 1 or Hq, m, length]
    return out.copy_(dense_attention(q, k, v, bias, False, scale, softcap))


def _empty_output(q: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], values.shape[3]).transpose(1, 2)


@_decode_attention.register_fake
def _(q, keys, values, positions, prompt, n, mask, scale, softcap, kernel="auto"):
    return _empty_output(q, values)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    prompt: int,
    n: int,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attend from new tokens to the compacted cache, whose last tokens they are.

    Args:
        q: queries of the new tokens `[B, Hq, m, D]`.
        keys, values: buffers `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`.
        positions: int64 `[B, G, P]` of the kept prompt tokens.
        prompt: prompt length in tokens.
        n: logical length in tokens; the buffers hold `P + n - prompt` of them.
        mask: over the logical length, bool or additive float, `[B or 1, Hq or 1, m or 1, n]`; None shows everything.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, Hq, m, Dv]`, token-major in memory.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: ZipVL (arXiv 2410.08584), decoding over the compacted KV cache.
    """
    return torch.ops.zipvl.decode_attention(q, keys, values, positions, prompt, n, mask, scale, softcap, kernel)
