"""select_tokens in plain PyTorch: what runs on CPUs, and what the kernels are compared with."""

from __future__ import annotations

import torch

from zipvl_compile.kernels.fixed_point import FIXED


def fewest_tokens(accumulated: torch.Tensor, tau: float) -> torch.Tensor:
    """Return p of every sample and group of `accumulated [B, G, n]`: int64 `[B, G]`."""
    ordered = (accumulated.sort(-1, descending=True).values * FIXED).to(torch.int64)
    running = ordered.cumsum(-1)
    enough = tau * running[..., -1:].double()
    p = (running.double() < enough).sum(-1) + 1
    # NaN or inf somewhere in q or k: there is no ranking to trust, so keep all and give what dense gives.
    return torch.where(accumulated.isfinite().all(-1), p, accumulated.shape[-1])


def best_tokens(scores: torch.Tensor, visible: torch.Tensor, p: int, keep_recent: int, normalise: bool) -> torch.Tensor:
    """Return the positions of the newest tokens and of the best others, p in all, ascending: int64 `[B, G, p]`.

    `normalise` ranks by `scores / visible`.
    """
    scores = scores / visible.clamp(min=1).unsqueeze(1) if normalise else scores.clone()
    # The newest visible tokens, counted from the end: with right padding they are not the last columns.
    shown = visible > 0
    newest = shown & (shown.flip(-1).cumsum(-1).flip(-1) <= keep_recent)
    scores.masked_fill_(newest.unsqueeze(1), float("inf"))
    # Bits order as the scores do, NaN above all. Ties go to the lower position, so that runs and devices agree.
    batch, groups, n = scores.shape
    bits = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    bits = torch.where(scores.isnan(), torch.iinfo(bits.dtype).max, bits)
    last = bits.kthvalue(n - p + 1, keepdim=True).values
    better, tie = bits > last, bits == last
    keep = better | (tie & (tie.cumsum(-1) <= p - better.sum(-1, keepdim=True)))
    return keep.view(-1).nonzero().view(batch, groups, p) % n


def protect(
    scores: torch.Tensor, visible: torch.Tensor, keep_first: int, protected: torch.Tensor | None
) -> torch.Tensor:
    """Return `scores [B, G, n]` in which the first visible tokens and those at `protected` rank with the newest."""
    if keep_first:
        shown = visible > 0
        first = shown & (shown.cumsum(-1) <= keep_first)
        scores = scores.masked_fill(first.unsqueeze(1), float("inf"))
    return scores if protected is None else scores.index_fill(2, protected % scores.shape[2], float("inf"))
