"""token_scores in plain PyTorch: what runs on CPUs, and what the kernels are compared with.

Probe rows come in blocks whose scores stay in the L2 cache, one sample and KV head at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from zipvl_compile.kernels.common.dense_attention import soft_capped
from zipvl_compile.kernels.common.masks import causal, rows_that_see, seen, share_seen
from zipvl_compile.kernels.probe_rows import cached_probe_rows

BLOCK_SCORES = 1 << 18  # scores that are computed at a time, 1 MiB: others may be using the last level of cache
LEAST_ROWS = 32  # of a matrix product, of all query heads of a KV head


@dataclass(frozen=True)
class _Block:
    """Probe rows `rows` of the list of them, which may see the first `end` tokens, all of them the first `first`."""

    rows: slice
    positions: torch.Tensor
    first: int
    end: int
    hidden: torch.Tensor | None  # bool [rows, end - first]


@functools.lru_cache(maxsize=64)
def _blocks(
    n: int, recent_probes: int, random_probes: int, seed: int, device: torch.device, is_causal: bool, step: int
) -> list[_Block]:
    """Return the probe rows in blocks of `step`: equal for all layers of a model."""
    rows = cached_probe_rows(n, recent_probes, random_probes, seed, device)
    limits, blocks = rows.tolist(), []
    for start in range(0, len(limits), step):
        block = slice(start, min(start + step, len(limits)))
        at = rows[block]
        first, end = (limits[start] + 1, limits[block.stop - 1] + 1) if is_causal else (n, n)
        hidden = ~causal(at, torch.arange(first, end, device=device)) if first < end else None
        blocks.append(_Block(block, at, first, end, hidden))
    return blocks


@dataclass
class _BlockMask:
    """What a mask says of one block: `bias [H', rows, end]` or None, `hidden` of that shape, `blind [H', rows, 1]`."""

    bias: torch.Tensor | None
    hidden: torch.Tensor
    blind: torch.Tensor


def _mask_of(mask: torch.Tensor, block: _Block, is_causal: bool) -> _BlockMask:
    part = (mask if mask.shape[2] == 1 else mask.index_select(2, block.positions))[..., : block.end]
    shown = seen(part, block.positions, is_causal)[0]
    return _BlockMask(part[0] if part.is_floating_point() else None, ~shown, ~shown.any(-1, keepdim=True))


@torch.library.custom_op("zipvl::token_scores_torch", mutates_args=())
def _scores_torch(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, recent_probes: int, random_probes: int, seed: int, groups: int, even: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = cached_probe_rows(k.shape[2], recent_probes, random_probes, seed, q.device)  # [m]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    (batch, query_heads, given, _), (_, kv_heads, n, _), m = q.shape, k.shape, rows.numel()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    accumulated = torch.zeros(batch, groups, n, dtype=dtype, device=q.device)
    probes = (q.index_select(2, rows) if given == n else q).to(dtype) * scale  # [B, Hq, m, D]
    factor = query_heads // kv_heads
    step = max(max(BLOCK_SCORES // max(n, 1), LEAST_ROWS) // factor, 1)
    blocks = _blocks(n, recent_probes, random_probes, seed, q.device, is_causal, step)
    weights = share_seen(mask, rows, is_causal, n, dtype).expand(batch, query_heads, -1) if even else None
    space = probes.new_empty(min(step, m) * factor * n)
    for b in range(batch):
        shared: dict[int, _BlockMask] = {}  # by block, of a mask that is the same for all heads
        for head in range(kv_heads):
            keys = k[b, head].to(dtype).contiguous().t()  # [D, n]
            heads = slice(head * factor, (head + 1) * factor)
            total = accumulated[b, head * groups // kv_heads]
            for i, block in enumerate(blocks):
                packed = probes[b, heads, block.rows].flatten(0, 1)  # [factor * rows, D]
                flat = space[: packed.shape[0] * block.end].view(-1, block.end)
                torch.mm(packed, keys[:, : block.end], out=flat)
                scores = flat.view(factor, -1, block.end)
                if softcap is not None:
                    scores.copy_(soft_capped(scores, softcap))
                if mask is None:
                    if block.hidden is not None:
                        scores[..., block.first :].masked_fill_(block.hidden, float("-inf"))
                    torch.softmax(flat, -1, out=flat)
                else:
                    own = shared.get(i)
                    if own is None:
                        sample = mask[b if mask.shape[0] > 1 else 0][None]
                        own = _mask_of(sample if mask.shape[1] == 1 else sample[:, heads], block, is_causal)
                        if mask.shape[1] == 1:
                            shared[i] = own
                    if own.bias is not None:
                        scores += own.bias
                    scores.masked_fill_(own.hidden, float("-inf"))
                    torch.softmax(flat, -1, out=flat)
                    # A row that sees nothing is padding: it gives no score and does not count.
                    scores.masked_fill_(own.blind, 0.0)
                total[: block.end] += flat.sum(0) if weights is None else weights[b, heads, block.rows].flatten() @ flat
    return accumulated / (query_heads // groups), rows_that_see(mask, rows, is_causal, batch, n, dtype)


@_scores_torch.register_fake
def _(q, k, mask, is_causal, scale, softcap, recent_probes, random_probes, seed, groups, even=False):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, n = q.shape[0], k.shape[2]
    return q.new_empty(batch, groups, n, dtype=dtype), q.new_empty(batch, n, dtype=dtype)


def token_scores_torch(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, recent_probes: int, random_probes: int, seed: int, groups: int, even: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return what `token_scores` returns, for inputs that it has checked."""
    probes = (recent_probes, random_probes, seed)
    return torch.ops.zipvl.token_scores_torch(q, k, mask, is_causal, scale, softcap, *probes, groups, even)
