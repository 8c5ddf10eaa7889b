"""What each `generate` did: how much was kept, what the cache takes, how long it took, what stayed dense and why.

    with zipvl_compile.requests() as done:
        model.generate(**inputs)
    done[0].kept, done[0].as_dict()

`ZIPVL_LOG=1` prints one line a `generate` in the place of that. Nothing is watched, and nothing costs time, otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.dynamo import in_place_for_zipvl
from zipvl_compile.report.compile_report import CompileReport, collect
from zipvl_compile.report.stats import CacheStats, stats

_here = threading.local()  # `.ran`: reports of the graphs that ran in the `generate` of this thread; `.lists`: to fill,
# each with whether models that are not compiled for zipvl count, too


@dataclass(frozen=True)
class RequestStats:
    """One `generate`.

    Attributes:
        model: name of its class.
        batch: sequences that it returned.
        prompt_tokens: in the cache before the first new token, earlier turns and image tokens included; 0 where it is
            not known, without a cache.
        new_tokens: of each sequence.
        prefill_ms: from the call to the first new token: image encoder, prefill, what `generate` adds (milliseconds).
        decode_ms: mean time of each later token (milliseconds); None where there is none.
        compiled: graphs that zipvl compiled meanwhile; that time is part of the others.
        dense: prompt attention that stayed dense: how many layers, by reason.
        cache: what the KV cache holds at the end; None where there is none, or one of several parts.
    """

    model: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    decode_ms: float | None
    compiled: int
    dense: dict[str, int] = field(default_factory=dict)
    cache: CacheStats | None = None

    @property
    def kept(self) -> float:
        """Return the share of prompt tokens that the layers hold, in [0, 1]; 1 where nothing was dropped."""
        layers = [] if self.cache is None else self.cache.layers
        shares = [one.kept / one.prompt_length if one.prompt_length else 1.0 for one in layers]
        return sum(shares) / len(shares) if shares else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, texts, lists and dicts, as JSON takes them."""
        own = {name: value for name, value in vars(self).items() if name not in ("cache", "dense")}
        return {
            **own,
            "kept": self.kept,
            "dense": dict(self.dense),
            "cache": None if self.cache is None else self.cache.as_dict(),
        }

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens:,} prompt tokens" + (f" x {self.batch}" if self.batch > 1 else "")]
        if self.cache is not None:
            saved = self.cache.bytes_freed / max(self.cache.bytes_dense, 1)
            parts += [f"{self.kept:.0%} kept", f"KV {self.cache.bytes_used / 1e6:,.1f} MB, {saved:.0%} saved"]
        parts += [f"prefill {self.prefill_ms:.0f} ms"]
        if self.decode_ms is not None:
            parts += [f"{self.new_tokens} new tokens, {self.decode_ms:.1f} ms each"]
        parts += [f"{self.compiled} graphs compiled meanwhile"] if self.compiled else []
        parts += [f"{count} layer{'s' * (count != 1)} dense ({reason})" for reason, count in self.dense.items()]
        return f"zipvl: {self.model}: " + "; ".join(parts)


@contextlib.contextmanager
def requests(*, every_model: bool = False) -> Iterator[list[RequestStats]]:
    """Collect what every `generate` of a compiled model does inside the `with` block, on this thread.

    Only models that generate by Hugging Face's `generate` and were compiled in place, by `model.compile` or
    `zipvl_compile.compile`.

    Args:
        every_model: also those that zipvl has no part in, for comparisons with them.

    Yields:
        a list that grows by one `RequestStats` with every `generate` that ends.
    """
    _watch()
    done: list[RequestStats] = []
    lists = _here.__dict__.setdefault("lists", [])
    lists.append((done, every_model))
    try:
        yield done
    finally:
        lists[:] = [one for one in lists if one[0] is not done]


def print_requests_if_asked() -> None:
    """Print a line to standard error for every `generate` from now on if the environment has `ZIPVL_LOG=1`."""
    if _prints():
        _watch()


def _prints() -> bool:
    return os.environ.get("ZIPVL_LOG", "0") not in ("", "0")


def now() -> float:
    """Return a clock in seconds, after all work queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def note_graph(report: CompileReport) -> None:
    """Note that a compiled graph runs."""
    ran = getattr(_here, "ran", None)
    if ran is not None:
        ran[id(report)] = report


@functools.cache
def _watch() -> None:
    """Put a watch around the `generate` of all models, once; it looks at the listeners with every call."""
    inner = GenerationMixin.generate

    @functools.wraps(inner)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        printed = _prints()
        listeners = getattr(_here, "lists", ())
        if not (printed or listeners) or getattr(_here, "ran", None) is not None:
            return inner(self, *args, **kwargs)
        ours = in_place_for_zipvl(self)
        lists = [one for one, every_model in listeners if ours or every_model]
        printed = printed and ours
        if not (printed or lists):
            return inner(self, *args, **kwargs)
        result, request = _measured(inspect.signature(inner).bind(self, *args, **kwargs), inner)
        for one in lists:
            one.append(request)
        if printed:
            print(request, file=sys.stderr, flush=True)
        return result

    GenerationMixin.generate = generate  # type: ignore[method-assign]


def _measured(call: inspect.BoundArguments, inner: Callable[..., Any]) -> tuple[Any, RequestStats]:
    """Run a `generate`, and return what it returns and what it did."""
    asked, model = call.arguments, call.arguments["self"]
    others = asked.setdefault("kwargs", {})
    config = asked.get("generation_config") or model.generation_config
    wants_dict = others.get("return_dict_in_generate", config.return_dict_in_generate)
    clock = _Clock()
    asked["stopping_criteria"] = StoppingCriteriaList([*(asked.get("stopping_criteria") or ()), clock])
    others["return_dict_in_generate"] = True
    _here.ran = {}
    try:
        with collect() as compiled:
            out = inner(*call.args, **call.kwargs)
        ran = list(_here.ran.values())
    finally:
        _here.ran = None
    cache = cache_of(out)
    held = stats(cache) if cache is not None and hasattr(cache, "layers") else None
    new = clock.last - clock.first + 1 if clock.times else 0
    length = max((one.length for one in held.layers), default=0) if held else 0
    sequences = getattr(out, "sequences", out)  # a generation loop of the user's own may return what it likes
    request = RequestStats(
        model=type(model).__name__,
        batch=len(sequences) if isinstance(sequences, torch.Tensor) else 1,
        prompt_tokens=max(length - new + 1, 0),
        new_tokens=new,
        prefill_ms=1e3 * (clock.times[0] - clock.start) if clock.times else 0.0,
        decode_ms=1e3 * (clock.times[-1] - clock.times[0]) / (new - 1) if new > 1 else None,
        compiled=len(compiled),
        dense=_dense(ran, 0 if held is None else len(held.layers)) if in_place_for_zipvl(model) else {},
        cache=held,
    )
    return (out if wants_dict else sequences), request


def _dense(ran: list[CompileReport], layers: int) -> dict[str, int]:
    """Return how many attentions of a prompt stayed dense, by reason: of as many layers as the cache has."""
    if not any(report.sites for report in ran):
        return {"no graph of zipvl ran, see zipvl_compile.explain": layers}
    prompts = (site for report in ran for site in report.sites if site.kind == "prefill" and not site.rewritten)
    return dict(Counter(reason for _, reason in {(site.layer, str(site.reason)): None for site in prompts}))


class _Clock(StoppingCriteria):
    """Writes down when each new token is there, and never stops the generation."""

    def __init__(self) -> None:
        self.start, self.times = now(), list[float]()
        self.first = self.last = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        self.last = input_ids.shape[1]
        self.first = self.first or self.last
        self.times.append(now())  # generate itself waits for the GPU here, to know whether all sequences have ended
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
