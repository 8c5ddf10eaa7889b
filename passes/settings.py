"""What a user chose, as far as the passes need it; every name is that of the option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zipvl_compile.passes.match.attention_site import AttentionShape

LeastTokens = Callable[[AttentionShape, torch.dtype, torch.device], int]


def _all() -> int:
    return 0


@dataclass(frozen=True)
class Settings:
    """Which tokens to keep, and what for.

    Attributes:
        min_tokens: shorter prompts stay dense (tokens); or what says so for an attention of a shape, dtype and device.
        newest_rows_read: how many of its newest rows those who get a hidden state from a graph read at most (tokens);
            0 is all rows. Asked where a graph gives one.
        the others: see `ZipVLOptions`.
    """

    tau: float = 0.975
    keep_ratio: float | None = None
    recent_probes: int = 64
    random_probes: int = 64
    seed: int = 0
    keep_recent: int = 1
    queries: str = "selected"
    evict: str = "drop"
    min_tokens: int | LeastTokens = 0
    kernel: str = "auto"
    newest_rows_read: Callable[[], int] = _all
