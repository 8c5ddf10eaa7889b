"""Measured choice between implementations of one operator, once per kind of shape.

Which kernel is fastest depends on the card, the head width, the dtype and the number of tokens, and vendor libraries
change with every release. So the first call of each kind runs all candidates on its own inputs and keeps the winner.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Hashable, Iterator

import torch

log = logging.getLogger("zipvl_compile")
Candidates = dict[str, Callable[[], torch.Tensor]]
_winners: dict[Hashable, str] = {}
ROUNDS = 5


def bucket(tokens: int) -> int:
    """Return `tokens` rounded up to a power of two or one and a half times that: lengths of a kind share a winner."""
    power = 1 << max(tokens - 1, 1).bit_length()
    return power * 3 // 4 if tokens <= power * 3 // 4 else power


def run(key: Hashable, candidates: Candidates) -> torch.Tensor:
    """Run the fastest candidate; the first call with `key` measures them all.

    A candidate that cannot take the inputs is left out. While a CUDA graph is captured nothing can be measured: then
    the first candidate runs and nothing is remembered.
    """
    winner = _winners.get(key)
    if winner is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return next(iter(candidates.values()))()
    if winner is None:
        times = measure(candidates)
        if not times:
            return next(iter(candidates.values()))()  # raises what it raised before
        winner = _winners[key] = min(times, key=times.__getitem__)
        log.info("zipvl: %s: %s of %s", key, winner, {name: f"{t * 1e3:.3f} ms" for name, t in times.items()})
    return candidates[winner]()


def measure(candidates: Candidates) -> dict[str, float]:
    """Return the median time in seconds of every candidate that runs; they run in turn, after one warm-up each."""
    times: dict[str, list[float]] = {}
    for name, candidate in candidates.items():
        # "No available kernel": this backend does not take these inputs, and warns of each reason.
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            candidate()
            times[name] = []
    for _ in range(ROUNDS):
        for name, taken in times.items():
            with _timer() as milliseconds:
                candidates[name]()
            taken.append(milliseconds() / 1e3)
    return {name: statistics.median(taken) if taken else math.inf for name, taken in times.items()}


@contextlib.contextmanager
def _timer() -> Iterator[Callable[[], float]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    start.record()
    yield milliseconds
    end.record()


def winners() -> dict[Hashable, str]:
    """Return what was chosen so far, by key."""
    return dict(_winners)
