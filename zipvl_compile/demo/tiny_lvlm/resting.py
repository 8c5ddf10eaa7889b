"""Attention that rests: what training adds to the loss so that rows that look for nothing look at ``<bos>``.

Rows of large pretrained models do so (attention sinks, arXiv 2309.17453; those of pictures, arXiv 2503.03321).  Here no
answer depends on what the rows of empty patches see, so that they would spread their attention evenly for ever, as no
pretrained model does.  Three terms, of a few rows of every layer (nats):

    picture    - log of the attention of rows of the picture to <bos>
    question   - log of the attention of rows of the questions to <bos>
    spread     entropy of the attention of rows of the questions

Attention that is even gives the entropy no gradient: ``question`` is what begins to pull it.
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
    picture: list[torch.Tensor] = field(default_factory=list)
    question: list[torch.Tensor] = field(default_factory=list)
    spread: list[torch.Tensor] = field(default_factory=list)

    @property
    def _terms(self) -> dict[str, list[torch.Tensor]]:
        return {"picture": self.picture, "question": self.question, "spread": self.spread}

    def loss(self, *weights: float) -> torch.Tensor:
        """The three terms, means over layers, heads and rows, weighed and added up: float32 ()."""
        terms = zip(weights, self._terms.values(), strict=True)
        return sum((weight * torch.stack(term).mean() for weight, term in terms), torch.zeros(()))

    def __str__(self) -> str:
        """The terms, layer by layer."""
        return ", ".join(
            f"{name} {' '.join(f'{one.item():.2f}' for one in term)}" for name, term in self._terms.items()
        )


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
    """scaled_dot_product_attention, as transformers calls it; the mask is bool or float, (batch, 1, n, n)."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    watched = _WATCHED.get()
    if watched is not None:
        few = query[:, :, watched.rows].unflatten(1, (key.shape[1], -1))  # (batch, KV heads, group, rows, head_dim)
        scores = scaling * few @ key[:, :, None].transpose(-1, -2)
        added = attention_mask[:, :, None, watched.rows]
        shown = added if added.dtype == torch.bool else added > float("-inf")
        if added is not shown:
            scores = scores + added
        logs = scores.masked_fill(~shown, float("-inf")).log_softmax(-1)
        of_picture, of_questions = logs[..., 0].tensor_split([watched.prefix_rows], dim=-1)
        watched.picture.append(-of_picture.mean())
        watched.question.append(-of_questions.mean())
        each = logs.exp() * logs.masked_fill(~shown, 0.0)  # the log of nothing has no gradient
        watched.spread.append(-each[..., watched.prefix_rows :, :].sum(-1).mean())
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
