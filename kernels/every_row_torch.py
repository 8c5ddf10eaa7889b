"""window_attention with queries="all" in plain PyTorch: every row attends to the kept tokens and to its neighbourhood.

A block of rows at a time, in two disjoint parts joined by log-sum-exp:

    early   kept tokens before the block, which every row of it sees: no causal mask, the large part
    local   the sinks and one slice of the keys: each row's window, and the kept tokens inside the block

Nothing is n x n, and no keys are copied but those of the slice.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import per_head
from zipvl_compile.kernels.common.log_sum_exp import joined, only, with_lse
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.common.masks import visible as shown_by
from zipvl_compile.kernels.common.token_copies import take_rows
from zipvl_compile.kernels.sparse_attention_torch import empty_output
from zipvl_compile.kernels.window_attention_torch import kept_tokens

BLOCK_ROWS = 128


def attend_every_row_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor, kept_v: torch.Tensor,
    positions: torch.Tensor, sinks: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, window: int,
) -> torch.Tensor:  # fmt: skip
    """Attend as `window_attention` says; `q` has the m newest rows, `kept_k` the P kept ones only."""
    (batch, heads, m, _), n = q.shape, k.shape[2]
    out, older = empty_output(q, v), n - m
    starts = range(older, n, BLOCK_ROWS)
    # How many kept tokens are early, [B, G, blocks]; at once, since a GPU has to be waited for.
    bounds = torch.tensor([start if is_causal else n for start in starts], device=q.device)
    counts = torch.searchsorted(positions, bounds.expand(*positions.shape[:2], -1).contiguous())
    most, least = counts.amax((0, 1)).tolist(), counts.amin((0, 1)).tolist()
    kept = kept_tokens(positions, n)  # [B, G, n]
    kept = kept if kept.shape[1] == 1 else per_head(kept, heads)  # [B, 1 or Hq, n]
    where = positions if positions.shape[1] == 1 else per_head(positions, heads)  # [B, 1 or Hq, P]
    real = sinks.clamp(max=n - 1)[:, None]  # [B, 1, S]; those that are not real are hidden
    sink_k, sink_v = (take_rows(x, real, x.new_empty(*x.shape[:2], sinks.shape[1], x.shape[3])) for x in (k, v))
    sink_mask = None if mask is None else take(mask, batch, None, real)  # [B, H, n or 1, S]
    sink_kept = kept.gather(2, real.expand(-1, kept.shape[1], -1))
    for i, start in enumerate(starts):
        rows = slice(start, min(start + BLOCK_ROWS, n))
        keys = slice(max(start - window + 1, 0), rows.stop)
        bound = start if is_causal else n
        row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]  # [m, 1]
        key = torch.arange(keys.start, keys.stop, device=q.device)
        near = (key <= row) & (key > row - window)  # [m, keys]
        inside = kept[..., keys] & (key >= bound)
        shown = (near & ~kept[..., None, keys]) | (inside.unsqueeze(2) & (key <= row))  # [B, 1 or Hq, m, keys]
        far = (sinks[:, None, None] <= row - window) & ~sink_kept.unsqueeze(2)  # [B, 1 or Hq, m, S]
        shown = torch.cat((far, shown), 3)
        own = None if mask is None else mask if mask.shape[2] == 1 else mask[:, :, rows]
        if mask is not None and own is not None and sink_mask is not None:
            part = sink_mask if mask.shape[2] == 1 else sink_mask[:, :, rows]
            part = torch.cat((part, own[..., keys].expand(batch, -1, -1, -1)), 3)
            shown = only(part, shown & shown_by(part))
        block = q[:, :, rows.start - older : rows.stop - older]
        near_k, near_v = (torch.cat((s, x[:, :, keys]), 2) for s, x in ((sink_k, k), (sink_v, v)))
        result = with_lse(block, near_k, near_v, shown, False, scale, softcap)
        if (p := most[i]) > 0:
            early = None
            if least[i] < p:  # samples or heads differ
                early = torch.arange(p, device=q.device) < counts[:, :, i, None]  # [B, G, P]
                early = (early if early.shape[1] == 1 else per_head(early, heads)).unsqueeze(2)
            if own is not None:
                taken = take(own, batch, None, where[..., :p])  # [B, H, m or 1, P]
                early = only(taken, shown_by(taken) & (True if early is None else early))
            kept_part = with_lse(block, kept_k[:, :, :p], kept_v[:, :, :p], early, False, scale, softcap)
            out[:, :, rows.start - older : rows.stop - older] = joined(*kept_part, *result)
        else:
            out[:, :, rows.start - older : rows.stop - older] = result[0]
    return out
