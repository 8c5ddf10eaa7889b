"""From which prompt length sparse prefill pays on this machine, and what it gains in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zipvl_compile.kernels.common.autotune import bucket
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes.cost_model import NEVER, break_even, choice_below, seconds
from zipvl_compile.passes.match.attention_site import AttentionShape
from zipvl_compile.passes.settings import LeastTokens
from zipvl_compile.report.known_machines import known_machine
from zipvl_compile.report.machine import machine

if TYPE_CHECKING:
    from zipvl_compile.report.explanation import Explanation

# How much tau will keep is not known before the prompt is: sparse attention must pay at the one fraction, and cost
# little more than dense attention if all is kept. Where that matters, attention is a third of prefill at most.
EXPECTED_KEPT = 0.5
WORST_LOSS = 0.1
#: Where no length was asked for: `window_attention` attends to all tokens from this fraction kept on, where every query
#: attends and no mask is in memory. What that costs more than a dense layer is the choice, a part of dense attention.
DENSE_FROM = 0.75
MOST_CHOICE = 0.15


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
        # Ranks that decided differently would wait for each other for ever: of what they share, each knows the same.
        speed = known_machine(device, dtype) if shape.shared else machine(device, dtype)
        length = break_even(shape, speed, kept)
        if options.keep_ratio is None and options.keep_tokens is None:
            worst = 1.0
            if shape.dense_from < 1:
                worst, length = shape.dense_from, max(length, choice_below(shape, speed, MOST_CHOICE))
            length = max(length, break_even(shape, speed, worst, WORST_LOSS))
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


def prefill_speedup(
    model: torch.nn.Module, explanation: Explanation, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Return by how much the decoder's prefill of the explained prompt is predicted to be faster than dense.

    All layers with all that they multiply; a layer that stayed dense counts as it is. Projections that are pruned
    around an attention are counted in full, as the cost model does. None where no layer is a prefill over a KV cache.
    """
    speed, n = machine(device, dtype), explanation.prompt_length
    dense = sparse = 0.0
    for row in explanation.rows:
        if row.kind != "prefill" or row.shape is None:
            continue
        others = max(multiply_adds(model, row.layer) - row.shape.work, 0) * row.shape.batch * n * speed.product
        before, after = seconds(row.shape, speed, n, 1.0 if row.kept is None else row.kept / n)
        dense += before + others
        sparse += (before if row.reason else after) + others
    return dense / sparse if sparse else None


def multiply_adds(model: torch.nn.Module, path: str) -> int:
    """Return how many multiply-adds a token takes in the products of the layer that a module path lies in.

    Of weights that hold many experts, as many count as a token is sent to.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = next((x for name in _CHOSEN if isinstance(x := getattr(text, name, None), int)), 1)
    parent = path.rpartition(".")[0]
    if not parent:  # the name of a node of the graph, where no module is known
        return 0
    try:
        layer = model.get_submodule(parent)
    except AttributeError:
        return 0
    weights = [x for x in layer.parameters() if x.dim() >= 2]
    return sum(x.numel() if x.dim() == 2 else x.numel() // x.shape[0] * min(chosen, x.shape[0]) for x in weights)


_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")  # as configs name how many experts a token is sent to
