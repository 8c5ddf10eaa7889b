"""The speed of this machine, for the cost model: what a file says, which is measured once per device and dtype.

Measuring takes a few tenths of a second, and on a GPU the seconds that Triton needs for kernels it has not compiled
yet; a compile takes many times that. On a GPU it takes a share of the memory that is free, or none; whatever fails, the
speed of a known machine stands in, and in the file, too, so that every process has the same. The file is that of
`machine_file.py`, and ranks of one node share it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from zipvl_compile.dynamo import keep_gpu_asleep, with_real_tensors
from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.select_tokens import select_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.token_scores import token_scores
from zipvl_compile.passes.cost_model import Machine
from zipvl_compile.report.known_machines import known_machine
from zipvl_compile.report.machine_file import Entry, Key, NoPlace, agree, key_of, path, rounded, today

log = logging.getLogger("zipvl_compile")
_PROBES = 128


@dataclass(frozen=True)
class _Sizes:
    """What is measured: enough that the device is busy, and little enough that it takes less than a second."""

    heads: int
    width: int
    small: int  # prompt lengths (tokens)
    large: int

    def memory(self, element: int) -> int:
        """Return a bound of the bytes that measuring takes at once, for elements of so many bytes."""
        tensors = 8 * self.heads * self.large * self.width  # Q, K, V, K for scores, halves of the three, an output
        mask = self.large**2  # as booleans, and up to twice as numbers: kernels copy it
        matrices = 3 * self.side**2
        return (tensors + 2 * mask + matrices) * element + mask

    @property
    def side(self) -> int:
        """Return rows and columns of the matrices that are multiplied."""
        return self.large // 2


_ON_CPU = _Sizes(8, 64, 128, 2048)
#: From the best to the least that still says something.
_ON_GPU = (
    _Sizes(32, 128, 512, 8192),
    _Sizes(32, 128, 512, 4096),
    _Sizes(16, 128, 256, 4096),
    _Sizes(8, 128, 256, 2048),
)
#: Of the free memory of a GPU: the model that is being compiled needs the rest.
_SHARE = 0.25
_ROUNDS = 7
_asked_for: dict[tuple[torch.device, torch.dtype], Speed] = {}


@dataclass(frozen=True)
class Speed:
    """The speed of one machine, and where it comes from.

    Attributes:
        key: which machine.
        machine: the numbers.
        origin: "measured 2026-11-27", or why it is that of a known machine.
        file: that holds it; None where none could be written.
    """

    key: Key
    machine: Machine
    origin: str
    file: Path | None

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.2g}" for name, value in asdict(self.machine).items())
        place = f"in {self.file}; `zipvl measure` renews it" if self.file else "in no file"
        return f"Speed of {self.key} ({self.origin}, {place}): {numbers}."


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return the speed of `device` for tensors of `dtype`: the same in every process, see `speed`."""
    return speed(device, dtype).machine


def speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Return what the file says of this machine; measure it and write it there if it says nothing.

    Where no file can be written, and where measuring fails, a warning is logged and the answer is `known_machine`.
    """
    return _speed(device, dtype, torch.get_num_threads())


@functools.cache
def _speed(device: torch.device, dtype: torch.dtype, threads: int) -> Speed:
    asked = _asked(device, dtype)
    _asked_for[device, dtype] = asked
    return asked


def asked_for(device: torch.device) -> list[Speed]:
    """Return the speeds of a device that this process decided by, for reports."""
    return [speed for (one, _), speed in _asked_for.items() if one == device]


def renewed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measure this machine whatever the file says, and write it there; processes that run already keep what they read.

    Raises:
        NoPlace: (an OSError) the file cannot be written.
    """
    key = key_of(device, dtype)
    entry = agree(key, lambda: _entry(device, dtype), renew=True)
    _speed.cache_clear()
    return Speed(key, entry.speed, entry.origin, path())


def _asked(device: torch.device, dtype: torch.dtype) -> Speed:
    try:
        key = key_of(device, dtype)
    except Exception as error:  # no such device
        log.warning("zipvl cannot tell what %s is, and takes the speed of a known machine: %s", device, error)
        key = Key(str(device), "", "", 0, 0, str(dtype), torch.__version__, "")
        return Speed(key, known_machine(device, dtype), "a known machine", None)
    try:
        entry = agree(key, lambda: _entry(device, dtype))
        return Speed(key, entry.speed, entry.origin, path())
    except NoPlace as error:
        log.warning("zipvl takes the speed of a known machine: %s. Set ZIPVL_CACHE_DIR to a folder of yours.", error)
        return Speed(key, known_machine(device, dtype), "a known machine", None)


def _entry(device: torch.device, dtype: torch.dtype) -> Entry:
    try:
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        # A backend runs while Dynamo traces with fake tensors; these are real.
        with with_real_tensors(), torch.no_grad(), on_device:
            return Entry(rounded(_measure(device, dtype, _sizes(device, dtype))), today())
    except Exception as error:  # whatever it is, the user's model can be compiled without these numbers
        why = str(error).partition("\n")[0]
        log.warning(
            "zipvl could not measure %s, and takes the speed of a known machine until `zipvl measure`: %s", device, why
        )
        return Entry(known_machine(device, dtype), f"a known machine, since measuring failed: {why}")


def _sizes(device: torch.device, dtype: torch.dtype) -> _Sizes:
    """Return what is measured on a device, of a GPU by its free memory.

    Raises:
        MemoryError: the least takes more than its share.
    """
    if device.type != "cuda":
        return _ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    for sizes in _ON_GPU:
        if sizes.memory(dtype.itemsize) <= _SHARE * free:
            return sizes
    raise MemoryError(f"{free / 1e6:.0f} MB are free, of which {_SHARE:.0%} may be used")


def _measure(device: torch.device, dtype: torch.dtype, sizes: _Sizes) -> Machine:
    heads, width, small, large = sizes.heads, sizes.width, sizes.small, sizes.large
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = (draw(1, heads, large, width) for _ in range(3))
    positions = torch.arange(0, large, 2, device=device).repeat(1, 1, 1)
    scores = token_scores(q, k)
    attention = torch.nn.functional.scaled_dot_product_attention
    of_scores = dtype if device.type == "cuda" else torch.float32  # in which scores are multiplied
    probes, keys = draw(heads, _PROBES, width).to(of_scores), k[0].to(of_scores).transpose(1, 2).contiguous()
    few_q, few_k, few_v = (x[:, :, :small].contiguous() for x in (q, k, v))
    half_q, half_k, half_v = (x[:, :, : large // 2].contiguous() for x in (q, k, v))
    mask = torch.ones(1, 1, large, large, dtype=torch.bool, device=device).tril()
    runs = {
        "attend masked": lambda: attention(q, k, v, mask),
        "attend": lambda: attention(q, k, v, is_causal=True),
        "attend half": lambda: attention(half_q, half_k, half_v, is_causal=True),
        "attend few": lambda: attention(few_q, few_k, few_v, is_causal=True),
        "multiply": lambda: probes @ keys,
        "score": lambda: token_scores(q, k),
        "select": lambda: select_tokens(*scores, keep_ratio=0.5),
        "gather": lambda: gather_tokens(k, positions),
        "site": lambda: sparse_prefill_attention(few_q, few_k, few_v),
    }
    matrix, host = draw(sizes.side, sizes.side), 0.0
    runs["product"] = lambda: matrix @ matrix
    if device.type == "cuda":
        times = _device_times(runs)
        launches = _times({name: runs[name] for name in ("attend few", "site")}, device)
        host = max(launches["site"] - launches["attend few"], 0.0)
    else:
        times = _times(runs, device)
    product = times["product"] / sizes.side**3
    # attend n^2 + edge n, through the times at two lengths
    quadratic = min(max(2 * times["attend"] - 4 * times["attend half"], 0.5 * times["attend"]), times["attend"])
    attend = quadratic / (heads * large**2 * width)
    edge = (times["attend"] - quadratic) / (heads * large * width)
    multiply = times["multiply"] / (heads * _PROBES * large * width)
    score = max(times["score"] / (heads * _PROBES * large) - multiply * width, 0.0)
    token = times["select"] / large
    byte = times["gather"] / (k.nbytes / 2)
    known = (score + multiply * width) * heads * min(_PROBES, small) * small + token * small
    site = max(times["site"] - known - times["attend few"] / 4, 0.0)
    masked = max(times["attend masked"] / times["attend"] - 1, 0.0)
    return Machine(attend, edge, multiply, score, token, byte, site, host, product, masked)


def sparse_prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep_ratio: float | None = None
) -> torch.Tensor:
    """Run a sparse attention from scores to output."""
    positions = select_tokens(*token_scores(q, k), tau=0.5, keep_ratio=keep_ratio)
    return sparse_attention(q, gather_tokens(k, positions), gather_tokens(v, positions), positions)


def _device_times(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least time of each run on the current GPU in seconds; the GPU sleeps while the host prepares it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(_ROUNDS + 1):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            keep_gpu_asleep(1_000_000)  # half a millisecond
            start.record()
            run()
            end.record()
            end.synchronize()
            if i:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: min(taken) for name, taken in times.items()}


def _times(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the least time of each run in seconds, which other load disturbs least; they run in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(_ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: min(taken) for name, taken in times.items()}
