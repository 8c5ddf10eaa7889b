"""`zipvl calibrate`: what selecting costs in each layer on the user's own pictures, and what each should skip.

    cost(l, s) = mean over prompts of KL(dense || only layer l selects, and its other tokens skip s)            (nats)
    worth(l, s) = share of the prefill's FLOPs + share of the cached tokens that this saves

over the tokens of the dense answer; s is attention alone or the whole layer.  Choices are made one by one, the one with
the most worth for its cost first, as long as the sum of costs stays within the target; then all of them are measured
together, and made anew within less until that stays within it, too.  One trace serves every layer: those that do not
select keep every token, which is a number of the budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from zipvl_compile.evaluate.compiled import compiled_for
from zipvl_compile.evaluate.flops import CountedFlops
from zipvl_compile.evaluate.layer_choices import Choice, Found, best_together
from zipvl_compile.evaluate.measures import kl
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes.match.reasons import Why
from zipvl_compile.passes.policy import Skip
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
        options: of the backend; `dense_layers` are those that should not select, `skip_in` those whose other tokens
            should pass the layer.
        choices: each layer that can select, alone.
        cost: of all that the options let select, together (nats).
        kept: share of the prompt that the cache keeps by these options, mean of all layers, in [0, 1].
        flops: of a prefill by these options, as a share of one in which every layer scores and keeps every token.
        target: that was asked for (nats).
        prompts: how many were measured.
    """

    options: dict[str, Any]
    choices: tuple[Choice, ...]
    cost: float
    kept: float
    flops: float
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
    """Prompts with a model's dense answers, and what the model makes of them as options have it.

    Attributes:
        layers: the numbers of those that can select, by the options that were compiled last.
        left_alone: the numbers of those that keep every token because the options say so.
    """

    def __init__(self, model: Any, prompts: Sequence[Inputs]) -> None:
        self.model, self.prompts = model, list(prompts)
        self.answers = [_answer(model, inputs) for inputs in self.prompts]
        given = zip(self.prompts, self.answers, strict=True)
        self.dense = [_log_probabilities(model, inputs, answer)[0] for inputs, answer in given]
        self.layers: list[int] = []
        self.left_alone: list[int] = []
        self.compiled: Any = None

    def compile(self, options: Mapping[str, Any]) -> bool:
        """Compile the model; return whether tokens pass a layer where that is asked for."""
        with collect() as reports:
            self.compiled = compiled_for(self.model, dict(options))
            _log_probabilities(self.compiled, self.prompts[0], self.answers[0])
        sites = [site for report in reports for site in report.sites if site.kind == "prefill"]
        numbers = [(number_of(site.layer, i), site.reason) for i, site in enumerate(sites)]
        self.layers = sorted({number for number, reason in numbers if reason is None})
        self.left_alone = sorted({number for number, reason in numbers if reason and reason.why is Why.DENSE_LAYER})
        return any(one.skipped == "" for report in reports for one in report.pruned)

    def of(self, layers: Collection[int]) -> Found:
        """Return what it is where only these layers select."""
        found, shares = [], []
        with only_in(layers):
            for inputs, answer, dense in zip(self.prompts, self.answers, self.dense, strict=True):
                got, out = _log_probabilities(self.compiled, inputs, answer)
                found.append(kl(dense, got))
                shares += [one.kept / one.prompt_length if one.prompt_length else 1.0 for one in stats(out).layers]
            with CountedFlops() as counted, torch.no_grad():
                self.compiled.generate(**self.prompts[0], max_new_tokens=1, do_sample=False)
        return Found(sum(found) / len(found), sum(shares) / len(shares), counted.total)


def calibrate(
    model: Any,
    prompts: Sequence[Inputs],
    options: Mapping[str, Any],
    target: float,
    advance: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """Measure every layer, and choose those that select and what their other tokens skip.

    Args:
        model: an LVLM in eval mode; stays as it is.
        prompts: inputs of `generate`, one sample each.
        options: of the backend, without `dense_layers`. With `skip` they say what is skipped; else both are measured.
        target: most that all selecting layers may cost together (nats).
        advance: called with what is measured next.

    Raises:
        ValueError: no layer can select.

    Source: the paper lets every layer select; layers differ by orders of magnitude in what that costs. To choose for
    each layer what is skipped is what DOP (arXiv 2507.02909) and ShortV (arXiv 2504.00502) do for whole models.
    """
    parsed = ZipVLOptions.parse(options)
    options = {"dense_layers": 0, **options}
    if parsed.score_every != 1:  # what a layer costs alone is asked of one that selects for itself
        options["score_every"] = 1
    both = "skip" not in options and parsed.skip == "attention" and parsed.prefill == "sparse"
    advance("dense answers, and a trace")
    measured = Measured(model, prompts)
    measured.compile(options)
    if not measured.layers:
        raise ValueError(
            "calibrate: expected a model with attention that zipvl rewrites, got none. `zipvl explain` says why."
        )
    every, choices = measured.layers, _each(measured, parsed.skip, advance)
    if both:
        advance("a trace where tokens pass whole layers")
        if measured.compile(_passing(options, every)):
            choices += _each(measured, "layer", advance)
    compiled = tuple(every) if both else ()

    def together(taken: Mapping[int, Choice]) -> Found:
        nonlocal compiled
        passing = tuple(sorted(layer for layer, one in taken.items() if both and one.skip == "layer"))
        advance(f"{len(taken)} layers together")
        if passing != compiled:
            measured.compile(_passing(options, passing))
            compiled = passing
        return measured.of(taken)

    taken, found = best_together(choices, target, together)
    dense = sorted({*every, *measured.left_alone} - {*taken})
    return Calibration(
        {**_passing(options, compiled), "dense_layers": dense},
        tuple(replace(one, chosen=taken.get(one.layer) is one) for one in choices),
        found.cost, found.kept, found.flops / measured.of(()).flops, target, len(measured.prompts),
    )  # fmt: skip


def _each(measured: Measured, skip: Skip, advance: Callable[[str], None]) -> list[Choice]:
    """Measure each layer alone, as the model is compiled."""
    dense, choices = measured.of(()), []
    for layer in measured.layers:
        advance(f"layer {layer}, {'whole' if skip == 'layer' else 'attention alone'}")
        found = measured.of([layer])
        choices.append(Choice(layer, skip, found.cost, 1 - found.flops / dense.flops, 1 - found.kept))
    return choices


def _passing(options: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Return options whose tokens pass the layers of these numbers; those of the options' own rule if there is none."""
    return {**options, "skip": "layer", "skip_in": list(layers)} if layers else dict(options)
