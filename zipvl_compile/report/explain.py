"""What zipvl does to every attention of a model, and why, before the model is compiled for real.

print(zipvl_compile.explain(model, **processor(images=image, text=prompt, return_tensors="pt")))
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache

from zipvl_compile.cache.hf_names import CACHE_NAMES, as_argument, cache_of
from zipvl_compile.cache.kept_tokens import COMPACT
from zipvl_compile.callers import LOGITS_TO_KEEP
from zipvl_compile.dynamo import TRACING_LOGGERS, apart, original_of
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes.match.outcome import Pruning, SiteOutcome
from zipvl_compile.report import compile_report as report
from zipvl_compile.report.explanation import ExplainedSite, Explanation
from zipvl_compile.report.machine import asked_for

Named = TypeVar("Named", SiteOutcome, Pruning)


def explain(model: torch.nn.Module, *, options: Mapping[str, Any] | None = None, **inputs: Any) -> Explanation:
    """Compile a model for zipvl on the side, run one prompt and one decode step, and list what was done where.

    The model is not changed, and nothing that it has compiled is used or replaced. The whole model runs in one call
    here, vision tower included; `generate` runs the vision tower of most models outside the compiled graphs. As in
    `generate`, the logits of the newest token alone are asked for, unless `logits_to_keep` is among the inputs.

    Args:
        model: a Hugging Face LVLM, compiled or not.
        options: of the backend, see `ZipVLOptions`; "inner" is "eager" unless given, which compiles in seconds.
        inputs: one prompt, as for `model.forward`: `input_ids [B, n]`, `attention_mask [B, n]`, pixel values, ...; with
            a cache of an earlier part, the next part of it. The cache is copied.

    Returns:
        An `Explanation` with one row per attention site.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown option, an input that the model does not take, or a model without a KV cache.
    """
    model = original_of(model)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}. Pass a Hugging Face model.")
    options = dict(options or {})
    parsed = ZipVLOptions.parse(options)
    if "inner" not in options:
        options["inner"] = "eager"
        options.pop("mode", None)  # Inductor's
    _check_inputs(model, inputs)
    inputs = {name: copy.deepcopy(given) if name in CACHE_NAMES else given for name, given in inputs.items()}
    with _undisturbed(model), report.collect() as reports, torch.no_grad():
        compiled = torch.compile(model.forward, backend="zipvl", **_separate(options))
        outputs = compiled(**{**_as_generate_asks(model), **inputs, "use_cache": True})
        cache = _cache_of(outputs, model)
        prompt_length = cache.get_seq_length()
        kept = _kept_counts(cache)
        notes = _decode_one_token(compiled, outputs, as_argument(cache, model.forward), inputs)
    sites = [site for one in reports for site in _in_model_order([_with_full_name(s, model) for s in one.sites], model)]
    rows = _with_kept_tokens(_without_repeats(sites), model, kept, prompt_length)
    pruned = [_with_full_name(pruning, model) for one in reports for pruning in one.pruned]
    notes += _read_rows(reports) + _around_attention(pruned) + _advice(rows, pruned)
    if parsed.min_tokens is None:
        notes += [str(speed) for speed in asked_for(outputs.logits.device)]
    return Explanation(_with_pruned(rows, pruned), prompt_length, notes)


class OwnOptions(dict):
    """Options that equal nothing else: Dynamo reuses compiled code for an equal backend with equal options, and then
    no report is made."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


def _separate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `torch.compile` that keep this compile apart from those of the user's model."""
    return {"options": OwnOptions(options), **apart()}


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Leave no trace: M-RoPE offsets of a generation under way, warnings shown, warnings that zipvl remembers."""
    offsets = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    warned = set(report._warned)
    loggers = [logging.getLogger(name) for name in TRACING_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        report._warned.clear()
        report._warned.update(warned)
        for module, rope_deltas in offsets:
            module.rope_deltas = rope_deltas


def _check_inputs(model: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
    if not any(name in inputs for name in ("input_ids", "inputs_embeds")):
        raise ValueError(
            f"inputs: expected a prompt as input_ids, got {sorted(inputs) or 'nothing'}. "
            'Pass **processor(images=image, text=prompt, return_tensors="pt").'
        )
    for name in CACHE_NAMES:
        cache = inputs.get(name)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"{name}: expected a transformers Cache, got {type(cache).__name__}. Leave it out.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a decoder-only LVLM, got the encoder-decoder {type(model).__name__}. "
            "Its prompt goes through the encoder, which zipvl leaves dense."
        )
    # A `**kwargs` in `forward` swallows any name, so the names are those that some part of the model declares.
    known: set[str] = set()
    for part in (model, getattr(model, "model", None), getattr(model, "language_model", None)):
        if isinstance(part, torch.nn.Module):
            known |= set(inspect.signature(part.forward).parameters)
    known -= {"self", "args", "kwargs"}
    for name in inputs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Remove it."
            raise ValueError(f"inputs: expected arguments of {type(model).__name__}.forward, got {name!r}. {hint}")


def _as_generate_asks(model: torch.nn.Module) -> dict[str, Any]:
    return {LOGITS_TO_KEEP: 1} if LOGITS_TO_KEEP in inspect.signature(model.forward).parameters else {}


def _read_rows(reports: list[report.CompileReport]) -> list[str]:
    """Say which rows are kept and attend because they are read, if others than the newest."""
    found = {one.demanded: None for one in reports if one.demanded}
    return [f"{text[0].upper()}{text[1:]}." for text in found]


def _cache_of(outputs: Any, model: torch.nn.Module) -> Cache:
    cache = cache_of(outputs)
    if cache is None or not isinstance(getattr(outputs, "logits", None), torch.Tensor):
        raise ValueError(
            f"model: expected one whose forward returns logits and a KV cache, got {type(model).__name__}, "
            f"which returned {type(outputs).__name__}. Explain the part that generates, such as model.language_model."
        )
    return cache


def _decode_one_token(
    compiled: Any, outputs: Any, cache: Mapping[str, Cache | None], inputs: Mapping[str, Any]
) -> list[str]:
    """Feed the likeliest next token back; return a note if the compacted cache could not be read."""
    step: dict[str, Any] = {"input_ids": outputs.logits[:, -1:].argmax(-1), **cache, "use_cache": True}
    mask = inputs.get("attention_mask")
    # Without padding, `generate` passes no mask either; M-RoPE models read one as the positions of all tokens.
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask.all():
        step["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    try:
        compiled(**step)
    except RuntimeError as error:
        return [f"The decode step failed: {str(error).partition(chr(10))[0]}"]
    return []


def _with_full_name(site: Named, model: torch.nn.Module) -> Named:
    """Complete the path of a site: after a graph break Dynamo counts it from the submodule it resumed in."""
    matches = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{site.layer}")]
    return replace(site, layer=matches[0]) if len(matches) == 1 else site


def _in_model_order(sites: list[SiteOutcome], model: torch.nn.Module) -> list[SiteOutcome]:
    """Sort the sites of one graph, which come pass by pass, by layer; names that are not modules stay in front."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda site: order.get(site.layer, -1))


def _without_repeats(sites: list[SiteOutcome]) -> list[SiteOutcome]:
    """Drop sites that a recompile reported again. Names in parentheses are graph nodes, which say nothing."""
    seen: set[SiteOutcome] = set()
    unique = []
    for site in sites:
        if site not in seen or site.layer.startswith("("):
            unique.append(site)
        seen.add(site)
    return unique


def _kept_counts(cache: Cache) -> dict[int, int]:
    """Return how many prompt tokens each of this package's cache layers keeps, by layer number."""
    layers = [(i, layer.cached_positions) for i, layer in enumerate(cache.layers) if isinstance(layer, COMPACT)]
    return {i: positions.shape[2] for i, positions in layers if positions is not None}


def _with_kept_tokens(
    sites: list[SiteOutcome], model: torch.nn.Module, kept: dict[int, int], prompt_length: int
) -> list[ExplainedSite]:
    """Pair prefill sites with cache layers: by the layer number of the module, else in execution order."""
    modules = dict(model.named_modules())
    prefill = [i for i, site in enumerate(sites) if site.kind == "prefill"]
    numbers = {i: getattr(modules.get(sites[i].layer), "layer_idx", None) for i in prefill}
    counts = {i: kept.get(number) for i, number in numbers.items() if number is not None}
    if not counts and len(prefill) == len(kept):
        counts = dict(zip(prefill, kept.values(), strict=True))
    return [
        ExplainedSite(
            site.layer, site.kind, site.reason, counts.get(i), prompt_length, shape=site.shape, note=site.note
        )
        for i, site in enumerate(sites)
    ]


def _with_pruned(rows: list[ExplainedSite], pruned: list[Pruning]) -> list[ExplainedSite]:
    parts = {pruning.layer: pruning.done for pruning in pruned}
    return [replace(row, pruned=parts.get(row.layer, "")) if row.kind == "prefill" else row for row in rows]


def _around_attention(pruned: list[Pruning]) -> list[str]:
    """Say which projections, or which layers, are computed for every token, and why."""
    found = Counter((part, reason) for pruning in pruned for part, reason in pruning.for_every_token.items())
    return [f"Computed for every token in {n} layers: {part} ({reason})." for (part, reason), n in found.items()]


def _advice(rows: list[ExplainedSite], pruned: list[Pruning]) -> list[str]:
    lines = (report.left_dense(row.reason for row in rows), report.split(pruned))
    return [line[0].upper() + line[1:] for line in lines if line is not None]
