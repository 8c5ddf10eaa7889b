"""Prefill with the default `min_tokens` against Inductor: what the cost model leaves dense and what it rewrites.

At every prompt length and every kept ratio, up to keeping all, zipvl should lose nothing. With `tau`, how many tokens
are kept is not known when the cost model decides; a `tau` that keeps nearly all of them is the worst case. The logits
of every token are asked for, so that no layer gains from computing the last row only.
"""

from __future__ import annotations

import pytest
import torch
from harness import decoder, interleaved, prompt, report

from zipvl_compile.cache.hf_names import cache_of

LAYERS = 2
LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
RATIOS = [0.4, 0.7, 0.9, 1.0]
OPTIONS = {f"keep_ratio {ratio}": {"policy": "paper", "keep_ratio": ratio} for ratio in RATIOS}
OPTIONS |= {f"tau {tau}": {"policy": "paper", "tau": tau} for tau in (0.975, 0.9999)}


@pytest.fixture(scope="module")
def models():
    """One model per option, compiled once for every length."""
    torch._dynamo.reset()
    made = {"dense": decoder(layers=LAYERS), **{name: decoder(layers=LAYERS) for name in OPTIONS}}
    made["dense"].compile(backend="inductor", dynamic=True)
    for name, options in OPTIONS.items():
        made[name].compile(backend="zipvl", options=options, dynamic=True)
    return made


@pytest.mark.benchmark(group="never slower")
@pytest.mark.parametrize("n", LENGTHS)
def test_never_slower(benchmark, models, n):
    ids = prompt(n)

    def run(model):
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True)

    rounds = max(5, min(101, 30_000 // n))
    times = interleaved({name: lambda model=model: run(model) for name, model in models.items()}, rounds=rounds)
    benchmark.pedantic(run, args=(models["keep_ratio 0.9"],), rounds=3)
    for name in OPTIONS:
        cache = cache_of(run(models[name]))
        kept = sum(layer.keys.shape[2] for layer in cache.layers) / LAYERS / n
        report("never_slower", "prefill", f"hidden 512, {LAYERS} layers, GQA 4, {n} tokens", name,
               dense=(times["dense"] * 1e3, "ms"), zipvl=(times[name] * 1e3, "ms"),
               speedup=(times["dense"] / times[name], "x"), cached=(kept, "fraction of the prompt"))  # fmt: skip
