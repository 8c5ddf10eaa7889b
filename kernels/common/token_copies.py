"""Copies of chosen token rows in PyTorch.

    take_rows   out[b, h, i] = x[b, h, positions[b, g(h), i]]
    put_rows    out[b, h, positions[b, g(h), i]] = x[b, h, i]

On a CPU, whole rows are copied, a head at a time: `gather` and `scatter` look up an index per element there and take
four to seven times as long. On other devices a launch per head would cost more than that.
"""

from __future__ import annotations

import itertools

import torch

from zipvl_compile.kernels.common.checks import per_head


def take_rows(x: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy the rows of `x [B, H, n, D]` at `positions [B, G, P]` to `out [B, H, P, D]`, and return `out`."""
    batch, heads, _, width = x.shape
    if x.device.type != "cpu":
        index = per_head(positions, heads).unsqueeze(3).expand(-1, -1, -1, width)
        return torch.gather(x, 2, index, out=out)
    shared = heads // positions.shape[1]
    for b, h in itertools.product(range(batch), range(heads)):
        torch.index_select(x[b, h], 0, positions[b, h // shared], out=out[b, h])
    return out


def put_rows(x: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy `x [B, H, P, D]` to the rows of `out [B, H, n, D]` at `positions [B, G, P]`, and return `out`."""
    batch, heads, _, width = x.shape
    if x.device.type != "cpu":
        return out.scatter_(2, per_head(positions, heads).unsqueeze(3).expand(-1, -1, -1, width), x)
    shared = heads // positions.shape[1]
    for b, group in itertools.product(range(batch), range(positions.shape[1])):
        own = slice(group * shared, (group + 1) * shared)
        out[b, own].index_copy_(1, positions[b, group], x[b, own])
    return out
