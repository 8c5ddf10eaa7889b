"""Tensors of a cache layer whose sizes stay the same while tokens are added, and what decoding asks on the device.

    fixed_rows(x [B, .., P + room, ..])                      a marker: the backend gives it the size of a bucket, and
                                                             lets CUDA graphs write into it
    fixed_positions(positions [B, G, P], prompt, room)       [B, G, P + room]: where each row stands, also those to come
    row_count(positions)                                     []: P

`into_bucket` rounds up: eight buckets to an octave, so that at most an eighth of a buffer is neither in use nor asked
for, and prompts that keep about equally many tokens get buffers of one size.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import fail
from zipvl_compile.kernels.token_positions import cached_positions

LEAST = 8  # rows

torch.library.define("zipvl::fixed_rows", "(Tensor x) -> Tensor")
torch.library.define("zipvl::fixed_positions", "(Tensor positions, SymInt prompt_length, SymInt room) -> Tensor")


@torch.library.impl("zipvl::fixed_rows", "CompositeImplicitAutograd")
def _fixed_rows(x: torch.Tensor) -> torch.Tensor:
    return x


@torch.library.impl("zipvl::fixed_positions", "CompositeImplicitAutograd")
def _fixed_positions(positions: torch.Tensor, prompt_length: int, room: int) -> torch.Tensor:
    return cached_positions(positions, prompt_length, prompt_length + room)


@torch.library.custom_op("zipvl::row_count", mutates_args=())
def _row_count(positions: torch.Tensor) -> torch.Tensor:
    return torch.tensor(positions.shape[2], device=positions.device)


@_row_count.register_fake
def _(positions):
    return positions.new_empty(())


def bucket(rows: int) -> int:
    """Return the least size of a bucket that holds so many rows: at most an eighth more than those, or 8."""
    step = max(1 << max(rows - 1, 0).bit_length() >> 4, 1) if rows > LEAST else 1
    return max(-(-rows // step) * step, LEAST)


def into_bucket(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the rows that its bucket has.

    Args:
        x: `[B, H, C, D]`, keys or values, or int64 `[B, G, C]`, where rows stand: those behind them count on; a number
            `[]` stays as it is.

    Raises:
        ValueError: x of another rank.
    """
    if x.dim() == 0:
        return x
    if x.dim() not in (3, 4):
        fail("into_bucket", "x", "a [batch, heads, rows, head_dim] or [batch, groups, rows] tensor", list(x.shape),
             "Reshape it.")  # fmt: skip
    rows = bucket(x.shape[2])
    if rows == x.shape[2]:
        return x
    if x.dim() == 3:
        last = x[:, :, -1:] if x.shape[2] else x.new_full((*x.shape[:2], 1), -1)
        return torch.cat([x, last + torch.arange(1, rows - x.shape[2] + 1, device=x.device)], 2)
    return torch.cat([x, x.new_zeros(*x.shape[:2], rows - x.shape[2], x.shape[3])], 2)


def fixed_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x, which the graph that is traced is to return with the size of a bucket, for good."""
    return torch.ops.zipvl.fixed_rows(x)


def fixed_positions(positions: torch.Tensor, prompt_length: int, room: int) -> torch.Tensor:
    """Return where each row of a buffer stands in the sequence.

    Args:
        positions: int64 `[B, G, P]` of the kept prompt tokens.
        prompt_length: in tokens; the first later token stands there.
        room: for how many later tokens.

    Returns:
        int64 `[B, G, P + room]`, ascending.
    """
    return torch.ops.zipvl.fixed_positions(positions, prompt_length, room)


def row_count(positions: torch.Tensor) -> torch.Tensor:
    """Return P of `positions [B, G, P]` on their device: int64 `[]`."""
    return torch.ops.zipvl.row_count(positions)
