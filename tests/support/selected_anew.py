"""Attention over a cache, and in float64 which tokens a later part or a re-selection keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Attention(torch.nn.Module):
    """Attention of one layer over a cache, as models call it."""

    def forward(self, q, k, v, mask, cache):
        k, v = cache.update(k, v, 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def chosen(queries, keys, places, shown, least):
    """Return which tokens are kept, by normalised scores of the newest rows of all, the oldest of them first."""
    rows, count = queries.shape[2], keys.shape[2]
    scores = queries @ keys.repeat_interleave(2, 1).transpose(2, 3) / 4
    seen = torch.ones(rows, count, dtype=torch.bool).tril(count - rows) & shown.gather(1, places)[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num().mean(1).sum(1)
    ranks = weights / seen[:, 0].sum(1).clamp(min=1)
    ranks[:, -1] = torch.inf  # the newest token is always kept
    return ranks.topk(least).indices.sort().values
