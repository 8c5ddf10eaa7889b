"""How long the first answer waits for the compiler: zipvl against Inductor, with empty caches."""

from __future__ import annotations

import statistics

import pytest
import torch
from harness import KEEP_RATIO, decoder, prompt, report, timed
from torch._inductor.utils import fresh_inductor_cache

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.report.machine import machine

LAYERS, TOKENS, ROUNDS = 8, 1024, 5
BACKENDS = {
    "dense": {"backend": "inductor"},
    "zipvl": {"backend": "zipvl", "options": {"policy": "paper", "keep_ratio": KEEP_RATIO, "min_tokens": 0}},
}


def first_calls(name: str) -> tuple[float, float]:
    """Return how long a prefill and decode steps take until nothing is compiled any more, beyond running, in seconds.

    The second decode step compiles, too: its cache has another length.
    """
    torch._dynamo.reset()
    model, ids, token = decoder(layers=LAYERS), prompt(TOKENS), prompt(1)
    model.compile(**BACKENDS[name])
    caches = []

    def prefill():
        caches.append(cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1)))

    def decode():
        model(input_ids=token, **as_argument(caches[-1]))

    with fresh_inductor_cache(), torch.no_grad():
        first = timed(prefill) - timed(prefill)
        return first, timed(decode) + timed(decode) - 2 * timed(decode)


@pytest.mark.benchmark(group="compile")
def test_compile_time(benchmark):
    with torch.no_grad():
        machine(torch.device("cpu"), torch.float32)  # measured once per process, 0.5 s
    first_calls("dense")  # the first compile of a process loads the compiler
    times = {name: [] for name in BACKENDS}
    for i in range(ROUNDS):
        times["dense"].append(first_calls("dense"))
        last = i == ROUNDS - 1
        times["zipvl"].append(benchmark.pedantic(first_calls, args=("zipvl",)) if last else first_calls("zipvl"))
    medians = {name: [statistics.median(taken) for taken in zip(*runs, strict=True)] for name, runs in times.items()}
    for part, dense, zipvl in zip(("prefill", "decode"), *medians.values(), strict=True):
        report("compile_time", part, f"hidden 512, {LAYERS} layers, GQA 4", "zipvl",
               dense=(dense, "s"), zipvl=(zipvl, "s"), ratio=(zipvl / dense, "x"))  # fmt: skip
    dense, zipvl = (sum(parts) for parts in medians.values())
    report("compile_time", "prefill and decode", f"hidden 512, {LAYERS} layers, GQA 4", "zipvl",
           dense=(dense, "s"), zipvl=(zipvl, "s"), ratio=(zipvl / dense, "x"))  # fmt: skip
