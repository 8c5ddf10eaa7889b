"""`--model zipvl`: a model of lmms-eval, compiled for zipvl, that says what its requests took beside the accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2, get_model
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, log_metrics
from loguru import logger

import zipvl_compile
from zipvl_compile.dynamo import raise_recompile_limit_of_all
from zipvl_compile.lmms.arguments import check_known, parameters, split, with_device_map
from zipvl_compile.lmms.bases import base_of
from zipvl_compile.lmms.pictures import same_pictures
from zipvl_compile.lmms.summary import Numbers, numbers, summary, text
from zipvl_compile.lmms.watching import TimedCalls, documents_asked
from zipvl_compile.report.requests import RequestStats, requests


class ZipVL(lmms):
    """`--model zipvl`, for chat messages where the model takes them; see docs/evaluation.md.

    Returns:
        no object of this class, but one of lmms-eval's model for the checkpoint, compiled and `Measured`.
    """

    is_simple = False

    def __new__(cls, **arguments: Any) -> Any:
        return build(arguments, cls.is_simple)


class ZipVLSimple(ZipVL):
    """`--model zipvl --force_simple`, which tasks of log-likelihoods need."""

    is_simple = True


@dataclass
class MeasuredCounts(TokenCounts):
    """Counts of tokens that `--log_samples` writes down with what the request took."""

    took: Numbers = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.took}


class Measured:
    """Comes before a class of lmms-eval: its answers, with what each took, and a summary."""

    calls: list[RequestStats] | None = None

    def loglikelihood(self, requests: list) -> list:
        calls: list[RequestStats] = []
        self.calls = calls
        try:
            with same_pictures(self):
                return _measured(self, super().loglikelihood, requests, "loglikelihood", calls)  # type: ignore[misc]
        finally:
            self.calls = None

    def generate_until(self, requests: list) -> list:
        return _generated(self, super().generate_until, requests, "generate_until")  # type: ignore[misc]

    def generate_until_multi_round(self, requests: list) -> list:
        asked = super().generate_until_multi_round  # type: ignore[misc]
        return _generated(self, asked, requests, "generate_until_multi_round")


class MeasuredModel(Measured):
    """The same for classes whose model is a property."""

    @property
    def model(self) -> Any:
        model = super().model  # type: ignore[misc]
        return model if self.calls is None else TimedCalls(model, self.calls)


def build(arguments: dict[str, Any], simple: bool) -> Any:
    """Return lmms-eval's model for a checkpoint, compiled.

    Args:
        arguments: those of `--model_args`, and `batch_size` and `device`.
        simple: takes a class for plain prompts where there is one.

    Raises:
        ValueError: an unknown or bad argument, or no such base.
    """
    asked = split(arguments)
    name = asked.base or base_of(asked.others.get("pretrained"), asked.others.get("revision"))
    names = MODEL_REGISTRY_V2.list_model_names()
    if name not in names or name == "zipvl":
        others = ", ".join(one for one in names if one != "zipvl")
        raise ValueError(f"model_args 'base': expected a model of lmms-eval, got {name!r}. Use one of {others}.")
    base = get_model(name, force_simple=simple)
    known = parameters(base)
    check_known(asked.others, name, known)
    mixin = MeasuredModel if isinstance(getattr(base, "model", None), property) else Measured
    kind = type(f"ZipVL{base.__name__}", (mixin, base), {"__module__": base.__module__})
    lm = kind(**with_device_map(asked.others, known, int(os.environ.get("WORLD_SIZE", "1"))))
    raise_recompile_limit_of_all()  # tasks have pictures of many sizes
    if asked.backend == "zipvl":
        zipvl_compile.compile(lm.model, **asked.options)
    elif asked.backend != "none":
        lm.model.compile(backend=asked.backend)
    return lm


def _generated(lm: Any, method: Callable[[list], list], asked: list, kind: str) -> list:
    with requests(every_model=True) as done:
        return _measured(lm, method, asked, kind, done)


def _measured(lm: Any, method: Callable[[list], list], asked: list, kind: str, done: list[RequestStats]) -> list:
    """Return the answers of lmms-eval's model, with what each request took; say and log the summary."""
    logged = len(get_logged_metrics_history())
    with documents_asked(lm, done) as documents:
        answers = method(asked)
    logger.info(text(kind, done))
    if done:
        _log(kind, done, counted=len(get_logged_metrics_history()) > logged)
    measured = documents.measured()
    of = (measured[request.task_name, request.doc_id] for request in asked)
    return [_with_counts(kind, answer, took) for answer, took in zip(answers, of, strict=True)]


def _log(kind: str, done: Sequence[RequestStats], counted: bool) -> None:
    """Add the summary to what lmms-eval prints below the scores and writes into its results.

    Args:
        kind: of the requests.
        done: what they took.
        counted: whether the model has logged its tokens and seconds itself.
    """
    tokens = 0 if counted else sum(one.new_tokens * one.batch for one in done)
    later = (one.decode_ms * (one.new_tokens - 1) if one.decode_ms is not None else 0.0 for one in done)
    seconds = 0.0 if counted else (sum(one.prefill_ms for one in done) + sum(later)) / 1e3
    values = {f"zipvl_{kind}_{name}": value for name, value in summary(done).items()}
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, values)


def _with_counts(kind: str, answer: Any, took: list[RequestStats]) -> Any:
    """Return an answer as lmms-eval takes one that comes with counts of tokens.

    lmms-eval 0.7 makes a text of a loss that comes without, and then fails to score it.
    """
    if kind not in ("loglikelihood", "generate_until"):
        return answer
    given = answer if isinstance(answer, GenerationResult) else GenerationResult(answer)
    counts = given.token_counts or TokenCounts()
    if took:
        counts = MeasuredCounts(**vars(counts), took=numbers(took.pop(0)))
    return GenerationResult(given.text, counts)
