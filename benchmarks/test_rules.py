"""Prefill by each selection rule against Inductor, and against what the rule's own FLOPs allow.

    make bench        appends to benchmarks/results/rules.jsonl

The bound is the FLOPs of the dense prefill over those of the rule's, counted as `zipvl eval` counts them: what it could
gain if choosing and moving tokens cost nothing and every operation ran as fast as it does in the dense model.
"""

from __future__ import annotations

import pytest
import torch
from harness import KEEP_RATIO, decoder, interleaved, prompt, report

from zipvl_compile.evaluate.flops import CountedFlops

LAYERS = 4
LENGTHS = [4096, 8192, 16384]
KEPT_BY_DEFAULT = 0.55  # what "balanced" keeps of text, see frontier.jsonl
RULES = {
    "paper": {"policy": "paper", "keep_ratio": KEEP_RATIO},
    "window": {"policy": "window", "keep_ratio": KEEP_RATIO},
    "kept and window": {"policy": "window", "kept_window": True, "keep_ratio": KEEP_RATIO},
    "union": {"policy": "union", "keep_ratio": KEPT_BY_DEFAULT},
}


def prefill(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def flops(options: dict | None, ids) -> int:
    """Return the FLOPs of a prefill, which a compiled graph of the same operators computes, too."""
    model = decoder(layers=LAYERS)
    if options is not None:
        model.compile(backend="zipvl", options=options | {"inner": "eager"})
    prefill(model, ids)
    with CountedFlops() as counted:
        prefill(model, ids)
    return counted.total


@pytest.mark.benchmark(group="rules")
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill_by_rule(benchmark, n):
    torch._dynamo.reset()
    ids = prompt(n)
    asked = {name: rule | {"min_tokens": 0} for name, rule in RULES.items()}
    bounds = {name: flops(None, ids) / flops(options, ids) for name, options in asked.items()}
    torch._dynamo.reset()
    models = {name: decoder(layers=LAYERS) for name in ("dense", *RULES)}
    models["dense"].compile(backend="inductor", dynamic=False)
    for name, options in asked.items():
        models[name].compile(backend="zipvl", options=options, dynamic=False)
    run = {name: lambda model=model: prefill(model, ids) for name, model in models.items()}
    times = interleaved(run, rounds=max(5, 20_000 // n), warm_up=1)
    benchmark.pedantic(run["union"], rounds=1)
    for name, bound in bounds.items():
        speedup, ratio = times["dense"] / times[name], RULES[name]["keep_ratio"]
        report("rules", "prefill", f"hidden 512, {LAYERS} layers, GQA 4, {n} tokens", f"{name}, keep_ratio {ratio}",
               dense=(times["dense"] * 1e3, "ms"), zipvl=(times[name] * 1e3, "ms"), speedup=(speedup, "x"),
               bound=(bound, "x"), speedup_over_bound=(speedup / bound, "fraction"))  # fmt: skip
