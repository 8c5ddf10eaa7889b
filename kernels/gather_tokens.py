"""KV compaction: copy the kept tokens into a buffer of their own, with spare room for decoding.

    out[b, h, i] = x[b, h, positions[b, g(h), i]]        for i < P;  the `spare` rows after that are unwritten

The copy is what frees memory: nothing of the full-length tensor stays alive.
`with_room` copies values that were computed for the kept tokens only.
`token_positions` is the marker that stands for "all tokens" until a pass puts a selection in its place.

Source: ZipVL (arXiv 2410.08584), KV cache of important tokens only.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.checks import check_positions, fail, per_head


@torch.library.custom_op("zipvl::token_positions", mutates_args=())
def _token_positions(k: torch.Tensor) -> torch.Tensor:
    return torch.arange(k.shape[2], device=k.device).repeat(k.shape[0], 1, 1)


@_token_positions.register_fake
def _(k):
    return k.new_empty(k.shape[0], 1, k.shape[2], dtype=torch.int64)


def token_positions(k: torch.Tensor) -> torch.Tensor:
    """Return the positions of every token of `k [B, Hkv, n, D]`: int64 `[B, 1, n]`, 0 to n - 1."""
    return torch.ops.zipvl.token_positions(k)


@torch.library.custom_op("zipvl::gather_tokens", mutates_args=())
def _gather_tokens(x: torch.Tensor, positions: torch.Tensor, spare: int, kernel: str = "auto") -> torch.Tensor:
    if x.dim() != 4:
        fail("gather_tokens", "x", "a [batch, heads, tokens, head_dim] tensor", list(x.shape), "Reshape it.")
    batch, heads, _, width = x.shape
    check_positions("gather_tokens", positions, batch, heads)
    p = positions.shape[2]
    out = x.new_empty(batch, heads, p + spare, width)
    index = per_head(positions, heads).unsqueeze(3).expand(-1, -1, -1, width)  # [B, H, P, D]
    torch.gather(x, 2, index, out=out[:, :, :p])
    return out


@_gather_tokens.register_fake
def _(x, positions, spare, kernel="auto"):
    batch, heads, _, width = x.shape
    return x.new_empty(batch, heads, positions.shape[2] + spare, width)


def gather_tokens(x: torch.Tensor, positions: torch.Tensor, spare: int = 0, kernel: str = "auto") -> torch.Tensor:
    """Copy the tokens at `positions` into a new contiguous buffer.

    Args:
        x: keys or values `[B, H, n, D]`.
        positions: int64 `[B, G, P]`, each in [0, n); `G` divides `H`.
        spare: unwritten rows after the kept ones, in tokens.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, H, P + spare, D]`, same dtype; rows from `P` on hold undefined values.

    Raises:
        ValueError: shapes or dtypes that do not fit. RuntimeError: a position outside [0, n).
    """
    return torch.ops.zipvl.gather_tokens(x, positions, spare, kernel)


@torch.library.custom_op("zipvl::with_room", mutates_args=())
def _with_room(x: torch.Tensor, spare: int) -> torch.Tensor:
    if x.dim() != 4:
        fail("with_room", "x", "a [batch, heads, tokens, head_dim] tensor", list(x.shape), "Reshape it.")
    batch, heads, p, width = x.shape
    out = x.new_empty(batch, heads, p + spare, width)
    out[:, :, :p] = x
    return out


@_with_room.register_fake
def _(x, spare):
    batch, heads, p, width = x.shape
    return x.new_empty(batch, heads, p + spare, width)


def with_room(x: torch.Tensor, spare: int) -> torch.Tensor:
    """Copy keys or values of the kept tokens into a buffer with spare room.

    Args:
        x: `[B, H, P, D]`.
        spare: unwritten rows after the kept ones, in tokens.

    Returns:
        `[B, H, P + spare, D]`, same dtype; rows from `P` on hold undefined values.

    Raises:
        ValueError: x of another rank.
    """
    return torch.ops.zipvl.with_room(x, spare)
