"""window_attention with queries="all" in plain PyTorch: every row attends to the kept tokens and to its neighbourhood.

A block of rows at a time, in two disjoint parts joined by log-sum-exp:

    early   kept tokens before the block, which every row of it sees: no causal mask, the large part
    near    the sinks and one slice of the keys (`near_keys`): each row's window, and the kept tokens inside the block

Nothing is n x n, and no keys are copied but those of the slice.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import per_head
from zipvl_compile.kernels.common.log_sum_exp import added, joined, only, with_lse
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.common.masks import visible as shown_by
from zipvl_compile.kernels.near_keys import NearKeys
from zipvl_compile.kernels.sparse_attention_torch import empty_output
from zipvl_compile.kernels.window_attention_torch import kept_tokens

BLOCK_ROWS = 128


def attend_every_row_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor, kept_v: torch.Tensor,
    positions: torch.Tensor, sinks: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, window: int,
) -> torch.Tensor:  # fmt: skip
    """Attend as `window_attention` says; `q` has the m newest rows, `kept_k` the P kept ones only."""
    heads, n = q.shape[1], k.shape[2]
    out, older = empty_output(q, v), n - q.shape[2]
    near = NearKeys(k, v, sinks, window, older, BLOCK_ROWS)
    starts = torch.tensor([max(start, 0) if is_causal else n for start in near.starts], device=q.device)
    # How many kept tokens are early, [B, G, blocks]; at once, since a GPU has to be waited for.
    counts = torch.searchsorted(positions, starts.expand(*positions.shape[:2], -1).contiguous())
    most, least = counts.amax((0, 1)).tolist(), counts.amin((0, 1)).tolist()
    kept, where = kept_tokens(positions, n), positions
    if kept.shape[1] > 1:
        kept, where, counts = (per_head(x, heads) for x in (kept, where, counts))
    of_column = near.at_columns(kept)
    shown = near.shown & ~of_column
    if is_causal:  # kept tokens inside the block, which are no early ones; a sink among them is in the slice
        inside = of_column & (near.column >= starts[:, None, None]) & (near.column <= near.row)
        inside[..., inside.shape[4] - sinks.shape[1] :] = False
        shown = shown | inside
    if mask is None:
        shown = added(shown, q.dtype)  # once, and not block by block
    none_blind = mask is None and is_causal  # a row sees itself, which is in its slice
    for i, block in enumerate(near.blocks(shown, mask)):
        p = most[i]
        rows = slice(block.rows.start - older, block.rows.stop - older)
        result = with_lse(q[:, :, rows], block.k, block.v, block.mask, False, scale, softcap, none_blind)
        if p == 0:
            out[:, :, rows] = result[0]
            continue
        early = None
        if least[i] < p:  # samples or heads differ
            early = (torch.arange(p, device=q.device) < counts[:, :, i, None]).unsqueeze(2)  # [B, 1 or Hq, 1, P]
        if mask is not None:
            own = mask if mask.shape[2] == 1 else mask[:, :, block.rows]
            own = take(own, len(q), None, where[..., :p])  # [B, H, m or 1, P]
            early = only(own, shown_by(own) if early is None else shown_by(own) & early)
        among_kept = with_lse(q[:, :, rows], kept_k[:, :, :p], kept_v[:, :, :p], early, False, scale, softcap)
        out[:, :, rows] = joined(*among_kept, *result)
    return out
