"""From which prompt length sparse prefill pays on this machine, and what it gains in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zipvl_compile.kernels.common.autotune import bucket
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes.cost_model import NEVER, break_even, seconds
from zipvl_compile.passes.match.attention_site import AttentionShape
from zipvl_compile.passes.settings import LeastTokens
from zipvl_compile.report.machine import machine

if TYPE_CHECKING:
    from zipvl_compile.report.explanation import Explanation

# How much tau will keep is not known before the prompt is: sparse attention must pay at the one fraction, and cost
# little more than dense attention if all is kept. Where that matters, attention is a third of prefill at most.
EXPECTED_KEPT = 0.5
WORST_LOSS = 0.1


def least_tokens(options: ZipVLOptions) -> int | LeastTokens:
    """Return the option `min_tokens`, or the cost model's answer for each attention where it is None.

    A break-even length is rounded up to a power of two or one and a half times that, so that the noise of measuring
    does not change from run to run which prompts stay dense.
    """
    if options.min_tokens is not None:
        return options.min_tokens
    if options.prefill == "dense":  # asked for to have a smaller cache, which every prompt gets
        return 0
    kept = max(options.keep_ratio or (1.0 if options.tau >= 1 else EXPECTED_KEPT), options.floor)

    def least(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> int:
        speed = machine(device, dtype)
        length = break_even(shape, speed, kept)
        if options.keep_ratio is None and options.keep_tokens is None:
            length = max(length, break_even(shape, speed, 1.0, WORST_LOSS))
        return length if length >= NEVER else bucket(length)

    return least


@dataclass(frozen=True)
class LayerCost:
    """What the cost model says of the prefill attention of one layer.

    Attributes:
        layer: path of the module.
        break_even: prompt length from which sparse attention is faster at this kept fraction, in tokens.
        dense, sparse: predicted times for the prompt at hand, in seconds.
        kept: fraction of the tokens that the layer kept.
    """

    layer: str
    break_even: int
    dense: float
    sparse: float
    kept: float

    @property
    def speedup(self) -> float:
        return self.dense / self.sparse

    def __str__(self) -> str:
        pays = "never" if self.break_even >= NEVER else f"from {self.break_even} tokens"
        return (
            f"{self.layer}: pays {pays} at {self.kept:.1%} kept; this prompt: dense {self.dense * 1e3:.2f} ms, "
            f"sparse {self.sparse * 1e3:.2f} ms, {self.speedup:.2f}x"
        )


def costs(explanation: Explanation, dtype: torch.dtype, device: torch.device) -> list[LayerCost]:
    """Return the predicted cost of every prefill attention of an explanation, on this machine.

    A layer that stayed dense is judged at `EXPECTED_KEPT`.
    """
    speed = machine(device, dtype)
    found = []
    for row in explanation.rows:
        if row.kind == "prefill" and row.shape is not None:
            kept = EXPECTED_KEPT if row.reason or row.kept is None else row.kept / row.prompt_length
            dense, sparse = seconds(row.shape, speed, explanation.prompt_length, kept)
            found.append(LayerCost(row.layer, break_even(row.shape, speed, kept), dense, sparse, kept))
    return found
