"""The speed of this machine, measured once per device and dtype, for the cost model.

Takes a few tenths of a second on a CPU; a compile takes many times that.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.select_tokens import select_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.token_scores import token_scores
from zipvl_compile.passes.cost_model import Machine

_HEADS, _WIDTH, _PROBES = 8, 64, 128
_SMALL, _LARGE = {"cpu": (128, 2048)}, (512, 8192)  # prompt lengths that are measured (tokens)
_ROUNDS = 7


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return the speed of `device` for tensors of `dtype`, measured at the first call.

    It depends on the number of threads, too: another number is measured again.
    """
    return _measured(device, dtype, torch.get_num_threads())


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Machine:
    # A backend runs while Dynamo traces with fake tensors; these are real.
    with _disable_current_modes(), torch.no_grad():
        return _measure(device, dtype)


def _measure(device: torch.device, dtype: torch.dtype) -> Machine:
    small, large = _SMALL.get(device.type, _LARGE)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = (draw(1, _HEADS, large, _WIDTH) for _ in range(3))
    positions = torch.arange(0, large, 2, device=device).repeat(1, 1, 1)
    scores = token_scores(q, k)
    attention = torch.nn.functional.scaled_dot_product_attention
    probes, width = draw(_HEADS, _PROBES, _WIDTH).float(), k[0].float().transpose(1, 2).contiguous()
    few_q, few_k, few_v = (x[:, :, :small].contiguous() for x in (q, k, v))
    half_q, half_k, half_v = (x[:, :, : large // 2].contiguous() for x in (q, k, v))
    times = _medians(
        {
            "attend": lambda: attention(q, k, v, is_causal=True),
            "attend half": lambda: attention(half_q, half_k, half_v, is_causal=True),
            "attend few": lambda: attention(few_q, few_k, few_v, is_causal=True),
            "multiply": lambda: probes @ width,
            "score": lambda: token_scores(q, k),
            "select": lambda: select_tokens(*scores, keep_ratio=0.5),
            "gather": lambda: gather_tokens(k, positions),
            "site": lambda: sparse_prefill_attention(few_q, few_k, few_v),
        },
        device,
    )
    # attend n^2 + edge n, through the times at two lengths
    quadratic = min(max(2 * times["attend"] - 4 * times["attend half"], 0.5 * times["attend"]), times["attend"])
    attend = quadratic / (_HEADS * large**2 * _WIDTH)
    edge = (times["attend"] - quadratic) / (_HEADS * large * _WIDTH)
    multiply = times["multiply"] / (_HEADS * _PROBES * large * _WIDTH)
    score = max(times["score"] / (_HEADS * _PROBES * large) - multiply * _WIDTH, 0.0)
    token = times["select"] / large
    byte = times["gather"] / (k.nbytes / 2)
    known = (score + multiply * _WIDTH) * _HEADS * min(_PROBES, small) * small + token * small
    site = max(times["site"] - known - times["attend few"] / 4, 0.0)
    return Machine(attend, edge, multiply, score, token, byte, site)


def sparse_prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep_ratio: float | None = None
) -> torch.Tensor:
    """Run a sparse attention from scores to output."""
    positions = select_tokens(*token_scores(q, k), tau=0.5, keep_ratio=keep_ratio)
    return sparse_attention(q, gather_tokens(k, positions), gather_tokens(v, positions), positions)


def _medians(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the median time of each run in seconds; they run in turn, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(_ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}
