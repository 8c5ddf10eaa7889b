"""Tokens that a layer does not keep, moved to host memory, and put back in their places when they are wanted again.

to_host(x, others)                            x[b, h, others[b, g(h), i]], on the CPU, in pinned memory for a GPU
with_others(kept, positions, others, n)       [B, H, n, D]: kept tokens at their positions, the others between them
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import check_positions, fail
from zipvl_compile.kernels.common.token_copies import put_rows, take_rows
from zipvl_compile.kernels.other_tokens import other_tokens


@torch.library.custom_op("zipvl::to_host", mutates_args=())
def _to_host(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    check_positions("to_host", others, x.shape[0], x.shape[1])
    rows = take_rows(x, others, x.new_empty(x.shape[0], x.shape[1], others.shape[2], x.shape[3]))
    return torch.empty(rows.shape, dtype=x.dtype, pin_memory=True).copy_(rows) if rows.is_cuda else rows


@_to_host.register_fake
def _(x, others):
    return x.new_empty(x.shape[0], x.shape[1], others.shape[2], x.shape[3], device="cpu")


@torch.library.custom_op("zipvl::with_others", mutates_args=())
def _with_others(kept: torch.Tensor, positions: torch.Tensor, others: torch.Tensor, n: int) -> torch.Tensor:
    check_positions("with_others", positions, kept.shape[0], kept.shape[1])
    count, (batch, heads, _, width) = positions.shape[2], kept.shape
    if kept.shape[2] < count or others.shape[2] < n - count:
        got = f"{kept.shape[2]} and {others.shape[2]}"
        fail("with_others", "kept, others", f"at least {count} and {n - count} tokens", got, "Check the cache.")
    every = put_rows(kept[:, :, :count], positions, kept.new_empty(batch, heads, n, width))
    return put_rows(others[:, :, : n - count].to(kept.device), other_tokens(positions, n), every)


@_with_others.register_fake
def _(kept, positions, others, n):
    return kept.new_empty(kept.shape[0], kept.shape[1], n, kept.shape[3])


def to_host(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Copy tokens to host memory.

    Args:
        x: keys or values `[B, H, n, D]`.
        others: int64 `[B, G, R]`, where they stand.

    Returns:
        `[B, H, R, D]` on the CPU, same dtype.

    Raises:
        ValueError: positions that are not of these samples and heads.
    """
    return torch.ops.zipvl.to_host(x, others)


def with_others(kept: torch.Tensor, positions: torch.Tensor, others: torch.Tensor, n: int) -> torch.Tensor:
    """Return every token of a prompt, in order.

    Args:
        kept: `[B, H, >= P, D]`, the kept ones first.
        positions: int64 `[B, G, P]`, ascending, where those stood.
        others: `[B, H, >= n - P, D]`, the other ones, in order, on any device.
        n: length of the prompt (tokens).

    Returns:
        `[B, H, n, D]`, on the device of `kept`.

    Raises:
        ValueError: tokens are missing.
    """
    return torch.ops.zipvl.with_others(kept, positions, others, n)
