"""Tokens that a layer does not keep, moved to host memory; `restore_tokens` puts them back in their places.

out[b, h, i] = x[b, h, others[b, g(h), i]]              on the CPU, in pinned memory where x is on a GPU
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import check_positions
from zipvl_compile.kernels.common.token_copies import take_rows


@torch.library.custom_op("zipvl::to_host", mutates_args=())
def _to_host(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    check_positions("to_host", others, x.shape[0], x.shape[1])
    rows = take_rows(x, others, x.new_empty(x.shape[0], x.shape[1], others.shape[2], x.shape[3]))
    return torch.empty(rows.shape, dtype=x.dtype, pin_memory=True).copy_(rows) if rows.is_cuda else rows


@_to_host.register_fake
def _(x, others):
    return x.new_empty(x.shape[0], x.shape[1], others.shape[2], x.shape[3], device="cpu")


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
