"""token_scores in plain PyTorch: what runs on CPUs, and what the kernels are compared with.

Probe rows come in blocks whose scores stay in the L2 cache, one sample and KV head at a time.
"""

from __future__ import annotations

import itertools

import torch

from zipvl_compile.kernels.dense_attention import soft_capped
from zipvl_compile.kernels.masks import causal, rows_that_see, seen
from zipvl_compile.kernels.probe_rows import cached_probe_rows

BLOCK_SCORES = 1 << 19  # scores that are computed at a time, 2 MiB


@torch.library.custom_op("zipvl::token_scores_torch", mutates_args=())
def _scores_torch(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, recent: int, random: int, seed: int, groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = cached_probe_rows(k.shape[2], recent, random, seed, q.device)  # [m]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    (batch, query_heads, given, _), (_, kv_heads, n, _), m = q.shape, k.shape, rows.numel()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    accumulated = torch.zeros(batch, groups, n, dtype=dtype, device=q.device)
    limits = rows.tolist()
    columns = torch.arange(n, device=q.device)
    probes = (q.index_select(2, rows) if given == n else q).to(dtype) * scale  # [B, Hq, m, D]
    factor = query_heads // kv_heads
    # A block of rows whose scores stay in the L2 cache from the product to the sums.
    step = max(BLOCK_SCORES // max(factor * n, 1), 4)
    space = probes.new_empty(min(step, m) * factor * n)
    for start in range(0, m, step):
        block = slice(start, min(start + step, m))
        at = rows[block]
        # Causality hides what comes after a block's last row from all of it, and nothing up to its first row.
        first, end = (limits[start] + 1, limits[block][-1] + 1) if is_causal else (n, n)
        hidden = ~causal(at, columns[first:end])
        if mask is not None:
            part = (mask if mask.shape[2] == 1 else mask.index_select(2, at))[..., :end].expand(batch, -1, -1, -1)
            may_see = seen(part, at, is_causal)  # [B, H or 1, rows, end]
        for b, head in itertools.product(range(batch), range(kv_heads)):
            heads = slice(head * factor, (head + 1) * factor)
            packed = probes[b, heads, block].flatten(0, 1)  # [factor * rows, D]
            scores = space[: packed.shape[0] * end].view(-1, end)
            torch.mm(packed, k[b, head, :end].to(dtype).t(), out=scores)
            scores = scores.view(factor, -1, end)
            if softcap is not None:
                scores.copy_(soft_capped(scores, softcap))
            if mask is None:
                scores[..., first:].masked_fill_(hidden, float("-inf"))
                torch.softmax(scores, -1, out=scores)
            else:
                own = slice(None) if mask.shape[1] == 1 else heads
                if part.is_floating_point():
                    scores += part[b, own]
                scores.masked_fill_(~may_see[b, own], float("-inf"))
                torch.softmax(scores, -1, out=scores)
                # A row that sees nothing is padding: it gives no score and does not count.
                scores.masked_fill_(~may_see[b, own].any(-1, keepdim=True), 0.0)
            accumulated[b, head * groups // kv_heads, :end] += scores.view(-1, end).sum(0)
    return accumulated / (query_heads // groups), rows_that_see(mask, rows, is_causal, batch, n, dtype)


@_scores_torch.register_fake
def _(q, k, mask, is_causal, scale, softcap, recent, random, seed, groups):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, n = q.shape[0], k.shape[2]
    return q.new_empty(batch, groups, n, dtype=dtype), q.new_empty(batch, n, dtype=dtype)
