"""What is measured: quality against the dense model, what a cache holds, and means with their standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from zipvl_compile.cache.kept_tokens import kept_tokens

Item = dict[str, Any]
"""One document or question of one variant: numbers by the name of the metric, and texts that say what it is."""

UNITS = {
    "nll": "nats", "kl": "nats", "agreement": "fraction", "rep_nll": "nats", "accuracy": "fraction",
    "kept": "fraction", "kv_bytes": "bytes", "kv_bytes_allocated": "bytes", "prefill_flops": "FLOP",
}  # fmt: skip
#: Metrics whose difference to dense, in the same item, is reported, and those of which the ratio to dense is.
COMPARED, COSTS = ("nll", "rep_nll", "accuracy"), ("kv_bytes", "kv_bytes_allocated", "prefill_flops")


class Mean(NamedTuple):
    """A mean and its standard error, None for a single value."""

    mean: float
    error: float | None


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of independent values and its standard error, `s / sqrt(n)`."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.fmean(values), error)


def paired(values: Sequence[float], dense: Sequence[float]) -> Mean:
    """Return the mean difference of values to those of the same items with dense, and its standard error."""
    return mean_of([value - base for value, base in zip(values, dense, strict=True)])


def nll(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the mean negative log-likelihood (nats) of `tokens [m]` under `log_probabilities [m, vocabulary]`."""
    return -log_probabilities.gather(1, tokens[:, None]).mean().item()


def kl(dense: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean divergence KL(dense || other) of log-probabilities `[m, vocabulary]` (nats)."""
    return torch.nn.functional.kl_div(other, dense, log_target=True, reduction="batchmean").item()


def agreement(dense: torch.Tensor, other: torch.Tensor) -> float:
    """Return the share of the rows of `[m, vocabulary]` that have the same likeliest token."""
    return (dense.argmax(1) == other.argmax(1)).double().mean().item()


def kept_share(cache: Cache, prompt_length: int) -> float:
    """Return the mean share of the prompt that layers hold, over those that can be compacted; 1 if there are none."""
    counts = [positions.shape[-1] for positions in kept_tokens(cache) if positions is not None]
    return statistics.fmean(counts) / prompt_length if counts else 1.0


def summary(items: Sequence[Item], dense: Sequence[Item]) -> dict[str, tuple[float, str]]:
    """Return `metric -> (value, unit)` of one variant; standard errors are metrics of their own, `..._se`.

    Args:
        items: of the variant.
        dense: the same documents or questions, in the same order, with the dense model.
    """
    found: dict[str, tuple[float, str]] = {}

    def add(metric: str, value: Mean, unit: str) -> None:
        found[metric] = (value.mean, unit)
        if value.error is not None:
            found[f"{metric}_se"] = (value.error, unit)

    for metric, unit in UNITS.items():
        if metric not in items[0]:
            continue
        values, base = [item[metric] for item in items], [item[metric] for item in dense]
        add(metric, mean_of(values), unit)
        if metric in COMPARED:
            add(f"{metric}_minus_dense", paired(values, base), unit)
        if metric in COSTS:
            found[f"{metric}_of_dense"] = (sum(values) / sum(base), "fraction")
    return found
