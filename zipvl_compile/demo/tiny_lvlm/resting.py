"""Attention that rests: what training adds to the loss so that rows that look for nothing look at ``<bos>``.

Rows of large pretrained models do so (attention sinks, arXiv 2309.17453; those of pictures, arXiv 2503.03321).  Here no
answer depends on what the rows of empty patches see, so that they would spread their attention evenly for ever, as no
pretrained model does.  Two terms, of a few rows of every layer:

    sink     - log of the attention of rows of the picture to <bos>      (nats)
    spread   entropy of the attention of rows of the questions           (nats)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "sdpa_watched"
ROWS = 32  # of the picture, and as many of the questions: a small part of the work


@dataclass
class Watched:
    """What some rows of each layer attended to: ``rows``, int64 (r,), the first ``prefix_rows`` are in the prefix."""

    rows: torch.Tensor
    prefix_rows: int
    sinks: list[torch.Tensor] = field(default_factory=list)
    spreads: list[torch.Tensor] = field(default_factory=list)

    def loss(self, sink_weight: float, spread_weight: float) -> torch.Tensor:
        """Both terms, means over layers, heads and rows, float32 ()."""
        return sink_weight * torch.stack(self.sinks).mean() + spread_weight * torch.stack(self.spreads).mean()

    def __str__(self) -> str:
        """Both terms, layer by layer."""
        sinks, spreads = (" ".join(f"{term.item():.2f}" for term in terms) for terms in (self.sinks, self.spreads))
        return f"sink {sinks}, spread {spreads}"


_WATCHED: ContextVar[Watched | None] = ContextVar("watched", default=None)


@contextlib.contextmanager
def watching(model: Any, rng: np.random.Generator, prefix: int, length: int) -> Iterator[Watched]:
    """Watch the decoder in a sequence of ``length`` rows, the first ``prefix`` of which are ``<bos>`` and patches."""
    picked = [rng.integers(1, prefix, ROWS), rng.integers(prefix, length, ROWS)]
    watched = Watched(torch.from_numpy(np.concatenate(picked)), ROWS)
    language = model.model.language_model
    usual = language.config._attn_implementation
    language.set_attn_implementation(NAME)
    token = _WATCHED.set(watched)
    try:
        yield watched
    finally:
        _WATCHED.reset(token)
        language.set_attn_implementation(usual)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """scaled_dot_product_attention, as transformers calls it; the mask is bool, (batch, 1, n, n)."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    watched = _WATCHED.get()
    if watched is not None:
        few = query[:, :, watched.rows].unflatten(1, (key.shape[1], -1))  # (batch, KV heads, group, rows, head_dim)
        scores = scaling * few @ key[:, :, None].transpose(-1, -2)
        shown = attention_mask[:, :, None, watched.rows]
        logs = scores.masked_fill(~shown, float("-inf")).log_softmax(-1)
        watched.sinks.append(-logs[..., : watched.prefix_rows, 0].mean())
        each = logs.exp() * logs.masked_fill(~shown, 0.0)  # the log of nothing has no gradient
        watched.spreads.append(-each[..., watched.prefix_rows :, :].sum(-1).mean())
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
