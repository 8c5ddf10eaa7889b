"""Decode steps over caches whose other tokens are dropped, or held at 8, 4 or 2 bits, on CPUs, in one run.

    full cache     zipvl over a cache that kept every token
    dropped        kept tokens alone
    8, 4, 2 bits   kept tokens in full and the others at so many bits, in one softmax

`make bench` appends to quantised_decode.jsonl.
"""

from __future__ import annotations

import pytest
import torch
from harness import KEEP_RATIO, decoder, interleaved, prompt, report
from test_decode import filled

import zipvl_compile
from zipvl_compile.cache.hf_names import as_argument

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs; GPUs have test_gpu_decode")
LAYERS, HIDDEN = 8, 512
KEPT = {"policy": "paper", "keep_ratio": KEEP_RATIO, "min_tokens": 0}
VARIANTS = {
    "full cache": {"tau": 1.0, "min_tokens": 0},
    "dropped": KEPT,
    **{f"{bits} bits": KEPT | {"evict": "quantize", "evict_bits": bits} for bits in (8, 4, 2)},
}


@pytest.mark.benchmark(group="quantised decode")
@pytest.mark.parametrize("n", [4096, 16384])
def test_a_step(benchmark, n):
    torch._dynamo.reset()
    with torch.no_grad():
        models, caches, token = {}, {}, prompt(1)
        for name, options in VARIANTS.items():
            models[name] = decoder(HIDDEN, LAYERS)
            models[name].compile(backend="zipvl", options=options)
            caches[name] = filled(models[name], prompt(n), False, 1)
        run = {
            name: lambda model=model, name=name: model(input_ids=token, **as_argument(caches[name])).logits
            for name, model in models.items()
        }
        away = {name: (run[name]() - run["full cache"]()).norm().item() for name in ("dropped", "8 bits", "2 bits")}
        assert away["8 bits"] < away["2 bits"] and away["8 bits"] < away["dropped"]
        times = interleaved(run, rounds=15, warm_up=5)
        benchmark.pedantic(run["4 bits"], rounds=5)
    case = f"hidden {HIDDEN}, {LAYERS} layers, GQA 4, {n} tokens"
    for name, cache in caches.items():
        held = zipvl_compile.stats(cache)
        report(
            "quantised_decode", "step", case, name, time=(times[name] * 1e3, "ms"),
            over_full=(times["full cache"] / times[name], "x"), kv_in_use=(held.bytes_used / 2**20, "MB"),
        )  # fmt: skip
