"""An independent model of ZipVL (arXiv 2410.08584), from its formulas, in float64 NumPy and one query at a time.

It shares no code with the operators: no batched matmul, no torch softmax, no additive bias, no gather of keys.
Only the probe rows are an input, because their draw is an implementation detail.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as float64 (bool and integers as they are)."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


class Mask:
    """What one query of one head may see, and what is added to its scores."""

    def __init__(self, mask: torch.Tensor | None, is_causal: bool) -> None:
        self.is_causal = is_causal
        self.values = None if mask is None else array(mask)
        self.lowest = None if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min

    def _row(self, b: int, h: int, i: int) -> np.ndarray:
        values = self.values
        return values[b if values.shape[0] > 1 else 0, h if values.shape[1] > 1 else 0, i]

    def seen(self, b: int, h: int, i: int, keys: int) -> np.ndarray:
        """Return which of `keys` keys query `i` sees: bool `[keys]`."""
        seen = np.ones(keys, dtype=bool)
        if self.is_causal:
            seen[i + 1 :] = False
        if self.values is not None:
            row = self._row(b, h, i)
            seen &= row if self.lowest is None else row > self.lowest
        return seen

    def added(self, b: int, h: int, i: int) -> np.ndarray | float:
        """Return what an additive mask adds to the scores of query `i`."""
        return 0.0 if self.values is None or self.lowest is None else self._row(b, h, i)


def _weights(query: np.ndarray, keys: np.ndarray, scale: float, softcap, added, seen: np.ndarray) -> np.ndarray:
    """Return softmax over the keys that are seen; all zero where none is."""
    weights = np.zeros(len(keys))
    if not seen.any():
        return weights
    plain = (keys * query).sum(-1) * scale
    capped = plain if softcap is None else [softcap * math.tanh(score / softcap) for score in plain]
    scores = (np.asarray(capped) + added)[seen]
    exponentials = np.exp(scores - scores.max())
    weights[seen] = exponentials / exponentials.sum()
    return weights


def scores(q, k, rows, *, mask=None, is_causal=True, scale=None, softcap=None, groups=1, even=False):
    """Return accumulated `[B, groups, n]` and visible `[B, n]`: attention summed over rows, averaged over heads."""
    q, k, look = array(q), array(k), Mask(mask, is_causal)
    batch, heads, n, width = q.shape
    factor, per_group = heads // k.shape[1], heads // groups
    scale = 1 / math.sqrt(width) if scale is None else scale
    accumulated, visible = np.zeros((batch, groups, n)), np.zeros((batch, n))
    for b in range(batch):
        for i in rows.tolist():
            seen_by_any = np.zeros(n, dtype=bool)
            for h in range(heads):
                seen = look.seen(b, h, i, n)
                seen_by_any |= seen
                weights = _weights(q[b, h, i], k[b, h // factor], scale, softcap, look.added(b, h, i), seen)
                share = seen.sum() / n if even else 1.0
                accumulated[b, h // per_group] += weights * share / per_group
            visible[b] += seen_by_any
    return accumulated, visible


def fewest(accumulated: np.ndarray, tau: float) -> int:
    """Return p of one sample: how many of the largest scores `[n]` it takes to reach `tau` of their sum."""
    ordered = sorted(accumulated.tolist(), reverse=True)
    goal = tau * math.fsum(ordered)
    for p in range(1, len(ordered) + 1):
        if math.fsum(ordered[:p]) >= goal:
            return p
    return len(ordered)


def selection(
    accumulated, visible, *, tau=0.975, keep_ratio=None, keep_tokens=None, floor=0.0, keep_recent=1, keep_first=0,
    protected=(), ranking=None,
) -> np.ndarray:  # fmt: skip
    """Return the kept positions `[B, groups, P]`: the paper's p tokens, then the protected ones on top of them.

    The paper's p tokens are the newest visible one and the best others by normalised score, or by `ranking`. A
    protected token that is among them already leaves its place on top to the next best token.
    """
    batch, groups, n = accumulated.shape
    if keep_tokens is not None:
        p = keep_tokens
    elif keep_ratio is not None:
        p = math.ceil(round(keep_ratio * n, 9))
    else:
        p = n if tau == 1 else max(fewest(accumulated[b, g], tau) for b in range(batch) for g in range(groups))
    p = min(max(p, math.ceil(round(floor * n, 9)), 1), n)
    size = min(p + keep_recent - 1 + keep_first + len(protected), n)
    kept = np.zeros((batch, groups, size), dtype=np.int64)
    for b in range(batch):
        shown = [j for j in range(n) if visible[b, j] > 0]
        for g in range(groups):
            normalised = [accumulated[b, g, j] / visible[b, j] if visible[b, j] else 0.0 for j in range(n)]
            rank = normalised if ranking is None else ranking[b, g]
            best_first = sorted(range(n), key=lambda j: (-rank[j], j))
            chosen = shown[-1:]
            chosen += [j for j in best_first if j not in chosen][: p - len(chosen)]
            always = [*shown[-keep_recent:], *shown[:keep_first], *dict.fromkeys(int(j) % n for j in protected)]
            chosen += [j for j in dict.fromkeys(always) if j not in chosen]
            chosen += [j for j in best_first if j not in chosen][: size - len(chosen)]
            kept[b, g] = sorted(chosen)
    return kept


def attention(
    q, k, v, positions, *, mask=None, is_causal=True, scale=None, softcap=None, queries="selected", window=64,
    sinks=4, kept_window=False, first=None,
) -> np.ndarray:  # fmt: skip
    """Return `[B, Hq, n, Dv]` from full-length `k`, `v`: a query attends to kept keys that it sees, or gives zero.

    With queries="hold", a token that is not kept gets the output of the kept one before it, or of the first kept one.
    With queries="window", it attends to its `window` newest keys and the `sinks` first ones; kept ones too, besides the
    kept keys, with `kept_window`; with queries="all" as well, every token does. `first` is where each sample starts.
    """
    q, k, v, look = array(q), array(k), array(v), Mask(mask, is_causal)
    batch, heads, n, width = q.shape
    factor, per_group = heads // k.shape[1], heads // positions.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = np.zeros((batch, heads, n, v.shape[3]))
    for b in range(batch):
        for h in range(heads):
            kept = np.zeros(n, dtype=bool)
            kept[np.asarray(positions[b, h // per_group])] = True
            for i in range(n):
                if kept[i] or queries in ("all", "window"):
                    wanted = kept.copy() if kept[i] or queries == "all" else np.zeros(n, dtype=bool)
                    attends = kept[i] or queries == "all"
                    if kept_window or not attends:
                        wanted[max(i - window + 1, 0) : i + 1] = True
                        start = 0 if first is None else int(first[b])
                        wanted[start : min(start + sinks, i + 1)] = True
                    seen = look.seen(b, h, i, n) & wanted
                    weights = _weights(q[b, h, i], k[b, h // factor], scale, softcap, look.added(b, h, i), seen)
                    out[b, h, i] = weights @ v[b, h // factor]
            for i in range(n) if queries == "hold" else ():
                before = np.flatnonzero(kept[: i + 1])
                out[b, h, i] = out[b, h, before[-1] if before.size else np.flatnonzero(kept)[0]]
    return out


def decode(q, k, v, positions, prompt_length: int, *, mask=None, scale=None, softcap=None) -> np.ndarray:
    """Return `[B, Hq, m, Dv]` of the newest tokens, from `k`, `v` of all logical tokens and the kept prompt tokens."""
    q, k, v, look = array(q), array(k), array(v), Mask(mask, is_causal=False)
    batch, heads, m, width = q.shape
    n = k.shape[2]
    factor, per_group = heads // k.shape[1], heads // positions.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = np.zeros((batch, heads, m, v.shape[3]))
    for b in range(batch):
        for h in range(heads):
            cached = np.arange(n) >= prompt_length
            cached[np.asarray(positions[b, h // per_group])] = True
            for i in range(m):
                seen = look.seen(b, h, i, n) & cached
                weights = _weights(q[b, h, i], k[b, h // factor], scale, softcap, look.added(b, h, i), seen)
                out[b, h, i] = weights @ v[b, h // factor]
    return out
