"""window_attention in plain PyTorch: a block of rows at a time attends to the keys near it (`near_keys`).

Kept rows are computed with the others and written over: leaving them out would widen the slices by as much as it saves.

With kept_window=True a kept row has two disjoint parts, its kept keys and its local ones, joined by log-sum-exp:

    o = o_kept + sigmoid(lse_local - lse_kept) (o_local - o_kept)
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import per_head
from zipvl_compile.kernels.common.dense_attention import dense_attention
from zipvl_compile.kernels.common.log_sum_exp import joined, only, with_lse
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.common.masks import visible as shown_by
from zipvl_compile.kernels.common.token_copies import put_rows, take_rows
from zipvl_compile.kernels.near_keys import NearKeys
from zipvl_compile.kernels.ragged_attention import attend_ragged, is_ragged
from zipvl_compile.kernels.sparse_attention_torch import attend_torch, empty_output

BLOCK_ROWS = 64, 256  # least and most rows of a block, otherwise as many as the window: a slice is at most half wasted


def first_visible(visible: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the first `count` visible tokens of each sample stand, int64 `[B, min(count, n)]`; n for none."""
    so_far = (visible > 0).cumsum(1)  # [B, n]
    wanted = torch.arange(1, min(count, visible.shape[1]) + 1, device=visible.device)
    return torch.searchsorted(so_far, wanted.expand(visible.shape[0], -1).contiguous())


def kept_tokens(positions: torch.Tensor, n: int) -> torch.Tensor:
    """Return which of n tokens are kept, bool `[B, G, n]`."""
    batch, groups, _ = positions.shape
    return torch.zeros(batch, groups, n, dtype=torch.bool, device=positions.device).scatter_(2, positions, True)


def attend_window_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor, kept_v: torch.Tensor,
    positions: torch.Tensor, sinks: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, window: int, kept_window: bool,
) -> torch.Tensor:  # fmt: skip
    """Attend as `window_attention` says; `sinks` is what `first_visible` returns, `kept_k` has the P kept rows only."""
    (batch, heads, n, width), p = q.shape, positions.shape[2]
    out = empty_output(q, v)
    lse = q.new_empty(batch, heads, n, 1, dtype=torch.promote_types(q.dtype, torch.float32)) if kept_window else None
    _attend_locally(out, lse, q, k, v, positions, sinks, mask, scale, softcap, window)
    if p == 0:
        return out
    kept_q = take_rows(q, positions, q.new_empty(batch, heads, p, width))
    if mask is not None and lse is None and is_ragged(mask, positions, is_causal, softcap):
        return put_rows(attend_ragged(kept_q, kept_k, kept_v, positions, mask, scale), positions, out)
    if mask is not None:
        where = positions if positions.shape[1] == 1 else per_head(positions, heads)  # [B, 1 or Hq, P]
        mask = take(mask, batch, where, where)  # [B, 1 or Hq, P or 1, P]
        mask = only(mask, shown_by(mask))
    if lse is None:
        kept = attend_torch(kept_q, kept_k, kept_v, positions, mask, is_causal, scale, softcap, False)
        return put_rows(kept, positions, out)
    kept, kept_lse = with_lse(kept_q, kept_k, kept_v, mask, is_causal, scale, softcap)
    local = take_rows(out, positions, out.new_empty(kept.shape))
    local_lse = take_rows(lse, positions, lse.new_empty(batch, heads, p, 1))
    return put_rows(joined(kept, kept_lse, local, local_lse).to(out.dtype), positions, out)


def _attend_locally(
    out: torch.Tensor, lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    positions: torch.Tensor, sinks: torch.Tensor, mask: torch.Tensor | None, scale: float | None,
    softcap: float | None, window: int,
) -> None:  # fmt: skip
    """Write every row's attention to its local keys to `out`, and its log-sum-exp to `lse [B, Hq, n, 1]`.

    With `lse`, kept rows leave the kept keys out.
    """
    heads, n = q.shape[1:3]
    near = NearKeys(k, v, sinks, window, 0, min(max(window, BLOCK_ROWS[0]), BLOCK_ROWS[1]))
    shown = near.shown
    if lse is not None:
        kept = kept_tokens(positions, n)
        kept = kept if kept.shape[1] == 1 else per_head(kept, heads)  # [B, 1 or Hq, n]
        shown = shown & ~(near.at_rows(kept) & near.at_columns(kept))
    for block in near.blocks(shown, mask):
        given = (q[:, :, block.rows], block.k, block.v, block.mask, False, scale, softcap)
        if lse is None:
            out[:, :, block.rows] = dense_attention(*given)
        else:
            out[:, :, block.rows], lse[:, :, block.rows] = with_lse(*given)
