"""What the benchmarks share: a Llama-like decoder, interleaved timing, and one line per measurement in results/.

Speed is a ratio: both variants run in turn in one process, and medians are compared. Absolute times of one machine say
little about another; the results file names the machine all the same.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zipvl_compile.dynamo import raise_recompile_limit_of_all
from zipvl_compile.evaluate.flops import CountedFlops
from zipvl_compile.evaluate.results import environment
from zipvl_compile.report.requests import now

raise_recompile_limit_of_all()  # many models in one process: no variant may fall back to eager mode
RESULTS = Path(os.environ.get("ZIPVL_RESULTS", Path(__file__).parent / "results"))
KEEP_RATIO = 0.367  # what the paper keeps on average in its efficiency figures
#: Tokens pass the layers that do not keep them, all but the first two.
SKIPPING = {"policy": "skip_layers", "dense_layers": 2, "keep_ratio": KEEP_RATIO}


def decoder(hidden: int = 512, layers: int = 4) -> LlamaForCausalLM:
    """Return a randomly initialised decoder, GQA 4, head_dim 64; every call gives the same weights."""
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), max_position_embeddings=1 << 17,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def prompt(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Return random token ids `[batch, n]` on the benchmark's device."""
    ids = torch.randint(0, 256, (batch, n), generator=torch.Generator().manual_seed(seed))
    return ids.to("cuda" if torch.cuda.is_available() else "cpu")


def prefill(model, ids: torch.Tensor):
    """Run a prompt for the logits of its last token."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def prefill_flops(model: LlamaForCausalLM, ids: torch.Tensor) -> int:
    """Return the FLOPs of a prefill, as `zipvl eval` counts them, of a dense model or of one with inner="eager"."""
    prefill(model, ids)
    with CountedFlops() as counted:
        prefill(model, ids)
    return counted.total


def prefill_against_bounds(
    file: str,
    case: str,
    build: Callable[[], LlamaForCausalLM],
    variants: dict[str, dict],
    ids: torch.Tensor,
    rounds: int,
) -> Callable[[], object]:
    """Report the speedup of prefill by each variant over Inductor, and over what its own FLOPs allow.

    Args:
        file, case: of the results.
        build: gives the model, with the same weights at every call.
        variants: options of the backend by name.
        ids: the prompt.
        rounds: of measuring.

    Returns:
        A prefill by the first variant.
    """
    flops = {"dense": prefill_flops(build(), ids)}
    for name, options in variants.items():
        model = build()
        model.compile(backend="zipvl", options=options | {"inner": "eager"})
        flops[name] = prefill_flops(model, ids)
    torch._dynamo.reset()
    models = {name: build() for name in flops}
    models["dense"].compile(backend="inductor", dynamic=False)
    for name, options in variants.items():
        models[name].compile(backend="zipvl", options=options, dynamic=False)
    run = {name: lambda model=model: prefill(model, ids) for name, model in models.items()}
    times = interleaved(run, rounds, warm_up=1)
    for name in variants:
        speedup, bound = times["dense"] / times[name], flops["dense"] / flops[name]
        report(file, "prefill", case, name,
               dense=(times["dense"] * 1e3, "ms"), zipvl=(times[name] * 1e3, "ms"), speedup=(speedup, "x"),
               bound=(bound, "x"), speedup_over_bound=(speedup / bound, "fraction"))  # fmt: skip
    return run[next(iter(variants))]


def timed(run: Callable[[], object]) -> float:
    """Return how long one call takes, in seconds, with the device idle before and after."""
    start = now()
    run()
    return now() - start


def device_times(variants: dict[str, Callable[[], object]], rounds: int = 20, warm_up: int = 5) -> dict[str, float]:
    """Return the median time of every variant on the GPU, in seconds, by CUDA events; the variants run in turn.

    A buffer of 256 MiB is written before every call, so that no variant finds its inputs in the L2 cache. Then the GPU
    sleeps for a millisecond, while the host prepares its launches: this is the time of the kernels, see `host_times`.
    """
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warm_up + rounds):
        for name, run in variants.items():
            flush.zero_()
            torch.cuda._sleep(2_000_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if i >= warm_up:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def host_times(variants: dict[str, Callable[[], object]], rounds: int = 20) -> dict[str, float]:
    """Return the median time that the host needs to launch every variant, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Return the median time of every variant, in seconds; the variants run in turn, `rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warm_up + rounds):
        for name, run in variants.items():
            seconds = timed(run)
            if i >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def amdahl(total: float, attention: float, cost: float) -> float:
    """Return the bound on the speedup where only attention, a part of `total`, shrinks to `cost` of itself."""
    return total / (total - attention + cost * attention)


def report(file: str, bench: str, case: str, variant: str, **metrics: tuple[float, str]) -> None:
    """Append measurements, `metric=(value, unit)`, to `results/file.jsonl` and print them."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{file}.jsonl").open("a") as out:
        for metric, (value, unit) in metrics.items():
            line = {"bench": bench, "case": case, "variant": variant, "metric": metric, "value": round(value, 4)}
            out.write(json.dumps(line | {"unit": unit} | environment(Path(__file__).parent)) + "\n")
    print(f"{bench} {case} {variant}: " + ", ".join(f"{m} {v:.3g} {u}" for m, (v, u) in metrics.items()))
