"""Dense and zipvl side by side: one model's weights, compiled several times, the same prompts, interleaved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch

from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.cache.kept_tokens import kept_tokens
from zipvl_compile.dynamo import raise_recompile_limit_of_all
from zipvl_compile.passes.match.outcome import SiteOutcome
from zipvl_compile.report.compile_report import CompileReport
from zipvl_compile.report.explain import OwnOptions
from zipvl_compile.report.requests import requests
from zipvl_compile.report.stats import stats

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """One greedy answer to one prompt, and what it took.

    Attributes:
        text: the new tokens, decoded.
        prompt_length: of the prompt (tokens).
        kept: kept prompt positions of each cache layer, int64 `[P]`; None for layers of another kind.
        kinds: of each cache layer, for people: "full attention", "sliding window", ...
        first_token: time to the first new token: vision tower, prefill and what `generate` adds (seconds).
        per_token: mean time of the later ones (seconds), None if there were none.
        kv_used: bytes of the cached keys and values at the end.
        kv_allocated: bytes of the memory behind them, spare rows and positions included.
    """

    text: str
    prompt_length: int
    kept: list[torch.Tensor | None]
    first_token: float
    per_token: float | None
    kv_used: int
    kv_allocated: int
    kinds: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """Answers to the same prompts, in the same order, by the name of who gave them: "dense" first, zipvl after it.

    The last of them is the one that is shown and judged.
    """

    answers: dict[str, list[Answer]]

    @property
    def dense(self) -> list[Answer]:
        return self.answers["dense"]

    @property
    def sparse(self) -> list[Answer]:
        return list(self.answers.values())[-1]

    @property
    def same(self) -> list[bool]:
        """Return, per prompt, whether the last answer is the text of the dense one."""
        return [a.text == b.text for a, b in zip(self.dense, self.sparse, strict=True)]

    @property
    def agreement(self) -> float:
        """Return the fraction of prompts with the same answer, in [0, 1]."""
        return mean(self.same)

    def kept_per_layer(self) -> list[tuple[float, float] | None]:
        """Return, per cache layer, the mean number of kept prompt tokens and their mean fraction of the prompt."""
        rows: list[tuple[float, float] | None] = []
        for layer in zip(*(answer.kept for answer in self.sparse), strict=True):
            counts = [kept.numel() for kept in layer if kept is not None]
            shares = [count / answer.prompt_length for count, answer in zip(counts, self.sparse, strict=False)]
            rows.append((mean(counts), mean(shares)) if counts else None)
        return rows


def compiled_copy(
    model: torch.nn.Module, options: Mapping[str, Any] | None, inner: str = "inductor", dynamic: bool | None = None
) -> Any:
    """Return a copy of a model that shares its weights, compiled in place.

    Whichever is compiled first, the recompile limit of Dynamo, which copies share, is the same for all.

    Args:
        model: stays as it is.
        options: of the zipvl backend; None compiles without zipvl.
        inner: the compiler: "inductor", "aot_eager" or "eager".
        dynamic: of `torch.compile`.
    """
    raise_recompile_limit_of_all()
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, weights)
    if options is None:
        copied.compile(backend=inner, dynamic=dynamic)
    else:
        copied.compile(backend="zipvl", options=OwnOptions({**options, "inner": inner}), dynamic=dynamic)
    return copied


def answer(model: Any, processor: Any, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Answer:
    """Generate greedily from one prompt (batch 1) and measure it.

    Raises:
        ValueError: the model generates without a KV cache.
    """
    n = inputs["input_ids"].shape[1]
    with requests(every_model=True) as done:
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        )
    cache = cache_of(out)
    if cache is None or not done:
        raise ValueError(
            f"model: expected one that generates with a KV cache, got {type(model).__name__}, which returned none. "
            "Set use_cache=True in its generation_config."
        )
    took, held = done[-1], stats(cache)
    return Answer(
        text=processor.batch_decode(out.sequences[:, n:], skip_special_tokens=True)[0].strip(),
        prompt_length=n,
        kept=[None if p is None else p[0, 0][p[0, 0] < n].cpu() for p in kept_tokens(cache)],
        first_token=took.prefill_ms / 1e3,
        per_token=None if took.decode_ms is None else took.decode_ms / 1e3,
        kv_used=held.bytes_used,
        kv_allocated=held.bytes_allocated,
        kinds=[_kind(layer) for layer in cache.layers],
    )


def _kind(layer: Any) -> str:
    """Return what a cache layer is for, for people."""
    if isinstance(layer, CompactLayer):
        return "full attention"
    name = type(layer).__name__
    known = {
        "Sliding": "sliding window",
        "LinearAttention": "linear attention",
        "Quantized": "quantized",
        "Static": "static",
    }
    return next((words for part, words in known.items() if part in name), name)


def warm_up(model: Any, processor: Any, prompts: Sequence[Inputs]) -> Answer:
    """Compile: answer one prompt of every length, with enough new tokens to reach the decode graph for any length."""
    by_length = {prompt["input_ids"].shape[1]: prompt for prompt in prompts}
    return [answer(model, processor, prompt, 4, min_new_tokens=4) for prompt in by_length.values()][-1]


def reached(model: Any, reports: Sequence[CompileReport]) -> list[SiteOutcome]:
    """Return what became of every attention of the prompts, by the reports of their compiles.

    Raises:
        ValueError: zipvl took no part.
    """
    sites = [site for report in reports for site in report.sites if site.kind == "prefill"]
    if not sites:
        raise ValueError(
            f"model: expected one whose prefill model.compile(backend='zipvl') reaches, got {type(model).__name__}, "
            "where it reached none. `zipvl explain` lists what it would do; models that hand over to an inner "
            "model's generate need model.language_model.compile(backend='zipvl')."
        )
    return sites


def compare(
    models: Mapping[str, Any],
    processor: Any,
    prompts: Sequence[Inputs],
    max_new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Answer every prompt with all models, which take turns in going first; call `advance` after each prompt."""
    result = Comparison({name: [] for name in models})
    for i, prompt in enumerate(prompts):
        turns = list(models.items())
        first = i % len(turns)
        for name, model in turns[first:] + turns[:first]:
            result.answers[name].append(answer(model, processor, prompt, max_new_tokens))
        advance()
    return result


def medians(answers: Sequence[Answer]) -> tuple[float, float | None]:
    """Return the median time to the first token and the median time per later token (seconds)."""
    later = [a.per_token for a in answers if a.per_token is not None]
    return median(a.first_token for a in answers), median(later) if later else None
