"""What a user chose, as far as the passes need it; every name is that of the option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zipvl_compile.passes.match.attention_site import PART_TOKENS, AttentionShape
from zipvl_compile.passes.policy import Policy

LeastTokens = Callable[[AttentionShape, torch.dtype, torch.device], int]


def _all() -> int:
    return 0


def _unknown() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Settings(Policy):
    """A selection rule, and what it is used for.

    Attributes:
        evict: what becomes of the other tokens of the KV cache: "drop", "host", "quantize", or "keep" for a full one.
        evict_bits: of each number of the others with "quantize".
        min_tokens: shorter prompts stay dense (tokens); or what says so for an attention of a shape, dtype and device.
        dense_from: fraction of kept tokens from which every token of a layer sees all, where `unselected` is "all".
        reselect_tokens: a later part of a prompt of so many tokens, or more, is selected anew with what is in memory
            (tokens); 0: none is.
        reselect_every: after so many generated tokens what is in memory is selected anew (tokens); 0: it is not.
        kernel: implementation of the operators.
        newest_rows_read: how many of its newest rows those who get a hidden state from a graph read at most (tokens);
            0 is all rows. Asked where a graph gives one.
        decoder_layers: how many layers the decoder has that a graph belongs to; None where nobody knows.
        per_request: the budget is an input of the graph, `BUDGET`, so that it may change from call to call.
    """

    evict: str = "drop"
    evict_bits: int = 4
    min_tokens: int | LeastTokens = 0
    dense_from: float = 1.0
    reselect_tokens: int = PART_TOKENS
    reselect_every: int = 0
    kernel: str = "auto"
    newest_rows_read: Callable[[], int] = _all
    decoder_layers: Callable[[], int | None] = _unknown
    per_request: bool = False
