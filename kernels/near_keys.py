"""The keys near the rows of a prompt: blocks of rows, each with one slice of the keys and the sinks behind it.

    block i     rows start_i .. stop_i      keys start_i - window + 1 .. stop_i, then the sinks

Slices measured faster on CPUs than one batch of overlapping views, which scaled_dot_product_attention wants copied.
What each row sees is computed for all blocks at once, n (block + window + sinks) bits, since a block by itself is too
small for a handful of operations. Blocks end with the prompt: only the first may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zipvl_compile.kernels.common.log_sum_exp import only
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.common.masks import visible as shown_by
from zipvl_compile.kernels.common.token_copies import take_rows


@dataclass(frozen=True)
class Block:
    """Some neighbouring rows.

    Attributes:
        rows: where they stand in the prompt.
        k, v: `[B, Hkv, K, D]` and `[B, Hkv, K, Dv]`, what they may see.
        mask: which of it they do, `[B or 1, 1 or Hq, rows, K]`, bool or additive, as the prompt's mask.
    """

    rows: slice
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor


class NearKeys:
    """The blocks of the newest rows of a prompt.

    Args:
        k, v: keys `[B, Hkv, n, D]` and values `[B, Hkv, n, Dv]`.
        sinks: int64 `[B, S]`, see `first_visible`; n for none.
        first: the first of the rows.
        size: rows of a block.

    Attributes:
        starts: where blocks start; that of the first may be before `first`.
        row: int64 `[blocks, size, 1]`, where rows stand.
        column: int64 `[B, 1, blocks, 1, size - 1 + window + S]`, where keys stand; clamped into the prompt.
        shown: bool `[B, 1, blocks, size, size - 1 + window + S]`, which are in the window of a row, or sinks before it.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, window: int, first: int, size: int):
        self.k, self.v, self.window, self.first, self.size = k, v, window, first, size
        batch, n = k.shape[0], k.shape[2]
        count = -(-(n - first) // size)
        self.starts = range(n - count * size, n, size)
        start = torch.arange(self.starts.start, n, size, device=k.device)[:, None, None]
        self.row = start + torch.arange(size, device=k.device)[:, None]
        key = start + torch.arange(1 - window, size, device=k.device)  # [blocks, 1, size - 1 + window]
        near = (key <= self.row) & (key > self.row - window) & (key >= 0)
        far = sinks[:, None, None, None] <= self.row - window  # a sink inside the window is there already
        self.sinks = sinks.clamp(max=n - 1)[:, None]  # [B, 1, S]; those that are not real are hidden
        self.shown = torch.cat((near.expand(batch, 1, -1, -1, -1), far), 4)
        keys = key.clamp(min=0).expand(batch, 1, -1, -1, -1)
        self.column = torch.cat((keys, self.sinks[:, :, None, None].expand(-1, -1, len(start), -1, -1)), 4)

    def at_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `x [B, H, n]` says of each key, `[B, H, blocks, 1, K]`."""
        index = self.column.flatten(1)[:, None].expand(-1, x.shape[1], -1)
        return x.gather(2, index).unflatten(2, self.column.shape[2:])

    def at_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `x [B, H, n]` says of each row, `[B, H, blocks, size, 1]`."""
        return x[:, :, self.row.clamp(min=0)]

    def blocks(self, shown: torch.Tensor, mask: torch.Tensor | None) -> Iterator[Block]:
        """Return the blocks, where rows see what is `shown` and not hidden by the mask of the prompt.

        Args:
            shown: `[B, H, blocks, size, K]`.
            mask: `[B or 1, Hq or 1, n or 1, n]`, bool or additive, or None.
        """
        count = self.sinks.shape[2]
        sinks = [take_rows(x, self.sinks, x.new_empty(*x.shape[:2], count, x.shape[3])) for x in (self.k, self.v)]
        sink_mask = None if mask is None else take(mask, len(shown), None, self.sinks)  # [B, H, n or 1, S]
        for i, start in enumerate(self.starts):
            rows, keys = slice(max(start, self.first), start + self.size), slice(max(start - self.window + 1, 0), None)
            keys = slice(keys.start, rows.stop)
            seen = shown[:, :, i, rows.start - start :, keys.start - (start - self.window + 1) :]
            if mask is not None and sink_mask is not None:
                own = slice(None) if mask.shape[2] == 1 else rows
                near = mask[:, :, own, keys].expand(len(shown), -1, -1, -1)
                part = torch.cat((near, sink_mask[:, :, own]), 3)
                seen = only(part, seen & shown_by(part))
            k, v = (torch.cat((x[:, :, keys], sink), 2) for x, sink in zip((self.k, self.v), sinks, strict=True))
            yield Block(rows, k, v, seen)
