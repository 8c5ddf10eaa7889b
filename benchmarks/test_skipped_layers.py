"""Prefill where tokens pass the layers that do not keep them, against Inductor, and against what its FLOPs allow.

    make bench        appends to benchmarks/results/skipped_layers.jsonl

A decoder of hidden 1,024, 12 layers, GQA 4, of which the first two keep every token. Short prompts, where attention is
a small part of the work. The bound is the FLOPs of the dense prefill over those of this one. "by default" lets the cost
model decide from which length it pays.
"""

from __future__ import annotations

import pytest
import torch
from harness import KEEP_RATIO, decoder, interleaved, prompt, report

from zipvl_compile.evaluate.flops import CountedFlops

HIDDEN, LAYERS, DENSE_LAYERS = 1024, 12, 2
LENGTHS = [128, 576, 1024, 2048, 4096]
SKIPPING = {"policy": "skip_layers", "dense_layers": DENSE_LAYERS, "keep_ratio": KEEP_RATIO}
VARIANTS = {
    "skipped layers": SKIPPING | {"min_tokens": 0},
    "skipped layers, by default": SKIPPING,
    "attention alone": {"policy": "paper", "dense_layers": DENSE_LAYERS, "keep_ratio": KEEP_RATIO, "min_tokens": 0},
}


def prefill(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def flops(options: dict | None, ids) -> int:
    """Return the FLOPs of a prefill, which a compiled graph of the same operators computes, too."""
    model = decoder(HIDDEN, LAYERS)
    if options is not None:
        model.compile(backend="zipvl", options=options | {"inner": "eager"})
    prefill(model, ids)
    with CountedFlops() as counted:
        prefill(model, ids)
    return counted.total


@pytest.mark.benchmark(group="skipped layers")
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill_with_skipped_layers(benchmark, n):
    torch._dynamo.reset()
    ids = prompt(n)
    bounds = {name: flops(None, ids) / flops(options, ids) for name, options in VARIANTS.items()}
    torch._dynamo.reset()
    models = {name: decoder(HIDDEN, LAYERS) for name in ("dense", *VARIANTS)}
    models["dense"].compile(backend="inductor", dynamic=False)
    for name, options in VARIANTS.items():
        models[name].compile(backend="zipvl", options=options, dynamic=False)
    run = {name: lambda model=model: prefill(model, ids) for name, model in models.items()}
    times = interleaved(run, rounds=max(5, 8_000 // n), warm_up=1)
    benchmark.pedantic(run["skipped layers"], rounds=1)
    for name, bound in bounds.items():
        speedup = times["dense"] / times[name]
        report("skipped_layers", "prefill", f"hidden {HIDDEN}, {LAYERS} layers, GQA 4, {n} tokens", name,
               dense=(times["dense"] * 1e3, "ms"), zipvl=(times[name] * 1e3, "ms"), speedup=(speedup, "x"),
               bound=(bound, "x"), speedup_over_bound=(speedup / bound, "fraction"))  # fmt: skip
