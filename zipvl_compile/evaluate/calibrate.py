"""`zipvl calibrate`: what selecting costs in each layer on the user's own pictures, and which layers should do it.

    cost(l) = mean over prompts of KL(dense || only layer l selects), over the tokens of the dense answer     (nats)

Layers are taken from the cheapest on, as long as the sum of their costs stays within the target; then all of them are
measured together, and the most expensive ones given up until that stays within it, too. One trace serves every layer:
those that do not select keep every token, which is a number of the budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from zipvl_compile.evaluate.compiled import compiled_for
from zipvl_compile.evaluate.measures import kl
from zipvl_compile.passes.prefill.refusals import number_of
from zipvl_compile.per_request import only_in
from zipvl_compile.report.compile_report import collect
from zipvl_compile.report.stats import stats

Inputs = Mapping[str, torch.Tensor]
ANSWER = 16  # tokens


@dataclass(frozen=True)
class Calibration:
    """What selecting costs, and the options that follow.

    Attributes:
        options: of the backend; `dense_layers` are those that should not select.
        costs: KL of each layer that can select, alone (nats).
        cost: of all that the options let select, together (nats).
        kept: share of the prompt that the cache keeps by these options, mean of all layers, in [0, 1].
        target: that was asked for (nats).
        prompts: how many were measured.
    """

    options: dict[str, Any]
    costs: dict[int, float]
    cost: float
    kept: float
    target: float
    prompts: int

    def write(self, path: Path) -> None:
        """Write it to the file that `options={"calibration": FILE}` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class _Forced(LogitsProcessor):
    """Lets `generate` give the tokens that it is told."""

    def __init__(self, tokens: torch.Tensor, prompt_length: int) -> None:
        self.tokens, self.start = tokens, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[input_ids.shape[1] - self.start]
        return torch.full_like(scores, float("-inf")).index_fill(1, token.view(1).to(scores.device), 0.0)


@torch.no_grad()
def _answer(model: Any, inputs: Inputs) -> torch.Tensor:
    """Return the greedy answer of a model, `[at most ANSWER]`."""
    ids = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return ids[0, length:] if ids.shape[1] > length else ids[0]


@torch.no_grad()
def _log_probabilities(model: Any, inputs: Inputs, answer: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return log-probabilities of each token of an answer given those before, `[m, vocabulary]`, and the cache."""
    forced = LogitsProcessorList([_Forced(answer, inputs["input_ids"].shape[1])])
    out = model.generate(
        **inputs, max_new_tokens=len(answer), min_new_tokens=len(answer), do_sample=False, logits_processor=forced,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(out.logits).float().log_softmax(1), out


class Measured:
    """A model dense and compiled, and prompts with its dense answers."""

    def __init__(self, model: Any, prompts: Sequence[Inputs], options: Mapping[str, Any]) -> None:
        self.prompts = list(prompts)
        self.answers = [_answer(model, inputs) for inputs in self.prompts]
        given = zip(self.prompts, self.answers, strict=True)
        self.dense = [_log_probabilities(model, inputs, answer)[0] for inputs, answer in given]
        with collect() as reports:
            self.compiled = compiled_for(model, dict(options))
            _log_probabilities(self.compiled, self.prompts[0], self.answers[0])
        sites = [site for report in reports for site in report.sites if site.kind == "prefill"]
        self.layers = sorted({number_of(site.layer, i) for i, site in enumerate(sites) if site.rewritten})

    def cost(self, layers: Collection[int]) -> tuple[float, float]:
        """Return the mean KL to dense where only these layers select, and the share of the prompt that is kept."""
        found, shares = [], []
        with only_in(layers):
            for inputs, answer, dense in zip(self.prompts, self.answers, self.dense, strict=True):
                got, out = _log_probabilities(self.compiled, inputs, answer)
                found.append(kl(dense, got))
                shares += [one.kept / one.prompt_length if one.prompt_length else 1.0 for one in stats(out).layers]
        return sum(found) / len(found), sum(shares) / len(shares)


def calibrate(
    model: Any,
    prompts: Sequence[Inputs],
    options: Mapping[str, Any],
    target: float,
    advance: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """Measure every layer, and choose those that select.

    Args:
        model: an LVLM in eval mode; stays as it is.
        prompts: inputs of `generate`, one sample each.
        options: of the backend, without `dense_layers`.
        target: most that all selecting layers may cost together (nats).
        advance: called with what is measured next.

    Raises:
        ValueError: no layer can select.

    Source: the paper lets every layer select; layers differ by orders of magnitude in what that costs.
    """
    advance("dense answers, and a trace")
    measured = Measured(model, prompts, options)
    if not measured.layers:
        raise ValueError(
            "calibrate: expected a model with attention that zipvl rewrites, got none. `zipvl explain` says why."
        )
    costs = {}
    for layer in measured.layers:
        advance(f"layer {layer}")
        costs[layer] = measured.cost([layer])[0]
    order, chosen, total = sorted(costs, key=lambda layer: costs[layer]), [], 0.0
    for layer in order:
        if (total := total + max(costs[layer], 0.0)) > target:
            break
        chosen.append(layer)
    advance(f"{len(chosen)} layers together")
    cost, kept = measured.cost(chosen)
    while cost > target and chosen:
        chosen.pop()
        advance(f"{len(chosen)} layers together")
        cost, kept = measured.cost(chosen)
    dense = [layer for layer in measured.layers if layer not in chosen]
    return Calibration({**options, "dense_layers": dense}, costs, cost, kept, target, len(measured.prompts))
