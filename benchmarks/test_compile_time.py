"""How long the first answer waits for the compiler: zipvl against Inductor, with empty caches."""

from __future__ import annotations

import statistics

import pytest
import torch
from harness import KEEP_RATIO, decoder, prompt, report, timed
from torch._inductor.utils import fresh_inductor_cache

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.report.machine import machine

LAYERS, TOKENS, ROUNDS = 8, 1024, 3
CASE = f"hidden 512, {LAYERS} layers, GQA 4"
ALL_PROMPTS = {"min_tokens": 0}  # by default this one is too short to be compacted, and compiles as without zipvl
BACKENDS = {
    "dense": {"backend": "inductor"},
    "by default": {"backend": "zipvl", "options": ALL_PROMPTS},
    "paper": {"backend": "zipvl", "options": {"policy": "paper", "keep_ratio": KEEP_RATIO} | ALL_PROMPTS},
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
    for _ in range(ROUNDS):
        for name in BACKENDS:
            times[name].append(first_calls(name))
    benchmark.pedantic(first_calls, args=("by default",))
    medians = {name: [statistics.median(taken) for taken in zip(*runs, strict=True)] for name, runs in times.items()}
    dense = medians.pop("dense")
    for name, taken in medians.items():
        parts = zip(
            ("prefill", "decode", "prefill and decode"), (*dense, sum(dense)), (*taken, sum(taken)), strict=True
        )
        for part, without, ours in parts:
            report("compile_time", part, CASE, name,
                   dense=(without, "s"), zipvl=(ours, "s"), ratio=(ours / without, "x"))  # fmt: skip
