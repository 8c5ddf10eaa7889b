"""Prefill where tokens pass the layers that do not keep them, against Inductor, and against what its FLOPs allow.

    make bench        appends to benchmarks/results/skipped_layers.jsonl

A decoder of hidden 1,024, 12 layers, GQA 4, of which the first two keep every token. Short prompts, where attention is
a small part of the work. The bound is the FLOPs of the dense prefill over those of this one. "by default" lets the cost
model decide from which length it pays.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness import SKIPPING, decoder, prefill_against_bounds, prompt

HIDDEN, LAYERS = 1024, 12
LENGTHS = [128, 576, 1024, 2048, 4096]
VARIANTS = {
    "skipped layers": SKIPPING | {"min_tokens": 0},
    "skipped layers, by default": SKIPPING,
    "attention alone": SKIPPING | {"policy": "paper", "min_tokens": 0},
}


@pytest.mark.benchmark(group="skipped layers")
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill_with_skipped_layers(benchmark, n):
    torch._dynamo.reset()
    case, build = f"hidden {HIDDEN}, {LAYERS} layers, GQA 4, {n} tokens", functools.partial(decoder, HIDDEN, LAYERS)
    run = prefill_against_bounds("skipped_layers", case, build, VARIANTS, prompt(n), rounds=max(5, 8_000 // n))
    benchmark.pedantic(run, rounds=1)
