"""What a user chose, as far as the passes need it; every name is that of the option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zipvl_compile.passes.match.attention_site import AttentionShape

LeastTokens = Callable[[AttentionShape, torch.dtype, torch.device], int]


def _every_row() -> bool:
    return False


@dataclass(frozen=True)
class Settings:
    """Which tokens to keep, and what for.

    Attributes:
        min_tokens: shorter prompts stay dense (tokens); or what says so for an attention of a shape, dtype and device.
        newest_row_only: whether those who get a hidden state from a graph read its newest row only; asked where a graph
            gives one.
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
    newest_row_only: Callable[[], bool] = _every_row
