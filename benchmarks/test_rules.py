"""Prefill by each selection rule against Inductor, and against what the rule's own FLOPs allow.

    make bench        appends to benchmarks/results/rules.jsonl

The bound is the FLOPs of the dense prefill over those of the rule's, counted as `zipvl eval` counts them: what it could
gain if choosing and moving tokens cost nothing and every operation ran as fast as it does in the dense model.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness import KEEP_RATIO, decoder, prefill_against_bounds, prompt

LAYERS = 4
LENGTHS = [4096, 8192, 16384]
KEPT_BY_DEFAULT = 0.55  # what "balanced" keeps of text, see frontier.jsonl
RULES = {
    f"paper, keep_ratio {KEEP_RATIO}": {"policy": "paper", "keep_ratio": KEEP_RATIO},
    f"window, keep_ratio {KEEP_RATIO}": {"policy": "window", "keep_ratio": KEEP_RATIO},
    f"kept and window, keep_ratio {KEEP_RATIO}": {"policy": "window", "kept_window": True, "keep_ratio": KEEP_RATIO},
    f"union, keep_ratio {KEPT_BY_DEFAULT}": {"policy": "union", "keep_ratio": KEPT_BY_DEFAULT},
}


@pytest.mark.benchmark(group="rules")
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill_by_rule(benchmark, n):
    torch._dynamo.reset()
    case, build = f"hidden 512, {LAYERS} layers, GQA 4, {n} tokens", functools.partial(decoder, layers=LAYERS)
    variants = {name: rule | {"min_tokens": 0} for name, rule in RULES.items()}
    run = prefill_against_bounds("rules", case, build, variants, prompt(n), rounds=max(5, 20_000 // n))
    benchmark.pedantic(run, rounds=1)
