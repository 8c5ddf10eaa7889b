"""What an attention mask says: which keys a query sees, and the part of it over chosen rows and columns.

A mask is bool (True = visible) or an additive float, `[B or 1, H or 1, queries or 1, keys]`.
"""

from __future__ import annotations

import torch


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Return where `mask` lets a query see a key, as bool of the same shape.

    An additive mask hides with -inf or with the most negative value of its dtype; biases such as ALiBi are
    far smaller, so half of that value separates the two.
    """
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def causal(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return which `columns [..., n]` the query positions `rows [..., m]` see causally: bool `[..., m, n]`."""
    return columns.unsqueeze(-2) <= rows.unsqueeze(-1)


def seen(mask: torch.Tensor, rows: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """Return which keys the query positions `rows [m]` see: bool `[B or 1, H or 1, m, n]`.

    Args:
        mask: of these queries, or one for all of them, over the first n keys: `[B or 1, H or 1, m or 1, n]`.
        rows: int64 `[m]`.
        is_causal: hide later keys, in addition to `mask`.
    """
    shown = visible(mask).expand(-1, -1, rows.numel(), -1)
    return shown & causal(rows, torch.arange(mask.shape[3], device=rows.device)) if is_causal else shown


def rows_that_see(
    mask: torch.Tensor | None, rows: torch.Tensor, is_causal: bool, batch: int, n: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return how many of the query positions `rows [m]`, ascending, see each of n keys: `[B, n]` of `dtype`.

    `mask` is over the whole prompt. A row counts once if any head lets it see the key.
    """
    if mask is not None:
        count = seen(mask if mask.shape[2] == 1 else mask.index_select(2, rows), rows, is_causal).any(1).sum(1)
    elif is_causal:
        count = rows.numel() - torch.searchsorted(rows, torch.arange(n, device=rows.device))[None]
    else:
        count = torch.full((1, n), rows.numel(), device=rows.device)
    return count.to(dtype).expand(batch, -1).contiguous()


def share_seen(
    mask: torch.Tensor | None, rows: torch.Tensor, is_causal: bool, n: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return what share of n keys each of the query positions `rows [m]` sees: `[B or 1, H or 1, m]`, in [0, 1].

    `mask` is over the whole prompt, `dtype` that of the result.
    """
    if mask is not None:
        count = seen(mask if mask.shape[2] == 1 else mask.index_select(2, rows), rows, is_causal).sum(-1)
    elif is_causal:
        count = (rows + 1)[None, None]
    else:
        count = torch.full_like(rows, n)[None, None]
    return count.to(dtype) / n


def take(mask: torch.Tensor, batch: int, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    """Gather mask rows and columns by positions.

    Args:
        mask: `[B or 1, H or 1, queries or 1, keys]`.
        batch: B.
        rows: int64 `[B, H', m]` query positions, or None for all. `H'` is 1 or the number of heads.
        columns: int64 `[B, H', P]` key positions, or None for all.

    Returns:
        `[B, max(H, H'), m or 1, P]`, same dtype as `mask`; one row stays one row.
    """
    heads = max([mask.shape[1], *(p.shape[1] for p in (rows, columns) if p is not None)])
    mask = mask.expand(batch, heads, -1, -1)
    if rows is not None and mask.shape[2] > 1:
        index = rows.expand(-1, heads, -1).unsqueeze(3)  # [B, H, m, 1]
        mask = mask.gather(2, index.expand(-1, -1, -1, mask.shape[3]))
    if columns is not None:
        index = columns.expand(-1, heads, -1).unsqueeze(2)  # [B, H, 1, P]
        mask = mask.gather(3, index.expand(-1, -1, mask.shape[2], -1))
    return mask
