"""Measured choice between implementations of one operator, once per kind of shape.

Which kernel is fastest depends on the card, the head width, the dtype and the number of tokens, and vendor libraries
change with every release. So the first call of each kind runs all candidates on its own inputs and keeps the winner.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import warnings
from collections.abc import Callable, Hashable, Iterator

import torch

from zipvl_compile.kernels.common.language import TritonError

log = logging.getLogger("zipvl_compile")
Candidates = dict[str, Callable[[], torch.Tensor]]
_winners: dict[Hashable, str] = {}
ROUNDS = 5


def bucket(tokens: int) -> int:
    """Return `tokens` rounded up to a power of two or one and a half times that: lengths of a kind share a winner."""
    power = 1 << max(tokens - 1, 1).bit_length()
    return power * 3 // 4 if tokens <= power * 3 // 4 else power


def run(key: Hashable, candidates: Candidates, device: torch.device) -> torch.Tensor:
    """Run the fastest candidate; the first call with `key` measures them all.

    While a CUDA graph is captured nothing can be measured: then the first candidate runs and nothing is remembered.

    Args:
        key: what kind of inputs these are, the device included.
        candidates: by name, each a call on the same inputs; the best guess first.
        device: of the inputs, which need not be the current one.

    Raises:
        Exception: what the first candidate raises, where none can take the inputs.
    """
    if key not in _winners and not _is_captured(device):
        times = measure(candidates, device)
        if times:
            winner = _winners[key] = min(times, key=times.__getitem__)
            log.info("zipvl: %s: %s of %s", key, winner, {name: f"{t * 1e3:.3f} ms" for name, t in times.items()})
    return candidates[_winners.get(key, next(iter(candidates)))]()


def measure(candidates: Candidates, device: torch.device) -> dict[str, float]:
    """Return the median time in seconds of every candidate that runs; they run in turn, after one warm-up each.

    A candidate that cannot take the inputs, or for which there is not enough memory, is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for warm in (False, *[True] * ROUNDS):
        for name in list(times):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PyTorch warns of each reason for "No available kernel"
                    with _timer(device) as milliseconds:
                        candidates[name]()
                    taken = milliseconds()
            except (RuntimeError, TritonError) as error:
                log.info("zipvl: %s is left out: %s", name, error)
                del times[name]
                continue
            if warm:
                times[name].append(taken / 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


@contextlib.contextmanager
def _timer(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield what gives the time, in milliseconds, that the body took on the current stream of `device`."""
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    start.record(stream)
    yield milliseconds
    end.record(stream)


def _is_captured(device: torch.device) -> bool:
    """Return whether the current stream of `device` is being recorded into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def winners() -> dict[Hashable, str]:
    """Return what was chosen so far, by key."""
    return dict(_winners)
