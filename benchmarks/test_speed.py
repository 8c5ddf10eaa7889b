"""Prefill and decode of a Llama-like decoder, zipvl against Inductor, in one run.

    make bench        appends to benchmarks/results/speed.jsonl

A benchmark first checks its result against the same graph without Inductor, and reports nothing where it is wrong.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from harness import KEEP_RATIO, amdahl, decoder, interleaved, prompt, report

LENGTHS = [512, 1024, 2048, 4096, 8192] if not torch.cuda.is_available() else [4096, 8192, 16384, 32768]


def attention_time(model, n: int) -> float:
    """Return the time of the dense causal attention of all layers, in seconds."""
    config = model.config
    shape = (1, config.num_attention_heads, n, config.head_dim)
    q, k, v = torch.randn(3, *shape, device=model.device, dtype=model.dtype)
    run = {"attention": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
    return interleaved(run, rounds=5)["attention"] * config.num_hidden_layers


@pytest.fixture(scope="module")
def models():
    torch._dynamo.reset()
    dense, sparse, check = decoder(), decoder(), decoder()
    options = {"keep_ratio": KEEP_RATIO, "min_tokens": 0}
    dense.compile(backend="inductor")
    sparse.compile(backend="zipvl", options=options)
    check.compile(backend="zipvl", options=options | {"inner": "eager"})
    with torch.no_grad():
        yield dense, sparse, check


def prefill(model, ids):
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill(models, benchmark, n):
    dense, sparse, check = models
    ids = prompt(n)
    torch.testing.assert_close(prefill(sparse, ids).logits, prefill(check, ids).logits, atol=1e-3, rtol=1e-3)
    times = interleaved({"dense": lambda: prefill(dense, ids), "zipvl": lambda: prefill(sparse, ids)}, rounds=5)
    benchmark.pedantic(prefill, args=(sparse, ids), rounds=3)
    speedup = times["dense"] / times["zipvl"]
    bound = amdahl(times["dense"], attention_time(dense, n), KEEP_RATIO**2)
    benchmark.extra_info.update(speedup=speedup, bound=bound)
    report("speed", "prefill", f"hidden 512, 4 layers, GQA 4, {n} tokens", f"keep_ratio {KEEP_RATIO}",
           dense=(times["dense"] * 1e3, "ms"), zipvl=(times["zipvl"] * 1e3, "ms"), speedup=(speedup, "x"),
           bound=(bound, "x"), speedup_over_bound=(speedup / bound, "fraction"))  # fmt: skip


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("n", LENGTHS[2:])
def test_decode(models, benchmark, n):
    dense, sparse, check = models
    ids, token = prompt(n), prompt(1)
    caches = {name: prefill(model, ids).past_key_values for name, model in (("dense", dense), ("zipvl", sparse))}
    step = {
        name: lambda model=model, name=name: model(input_ids=token, past_key_values=caches[name])
        for name, model in (("dense", dense), ("zipvl", sparse))
    }
    same = copy.deepcopy(caches["zipvl"])
    expected = check(input_ids=token, past_key_values=same).logits
    torch.testing.assert_close(step["zipvl"]().logits, expected, atol=1e-3, rtol=1e-3)
    times = interleaved(step, rounds=15, warm_up=4)
    benchmark.pedantic(step["zipvl"], rounds=5)
    bytes_kept = {
        name: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) for name, cache in caches.items()
    }
    speedup = times["dense"] / times["zipvl"]
    benchmark.extra_info.update(speedup=speedup)
    report("speed", "decode", f"hidden 512, 4 layers, GQA 4, {n} tokens", f"keep_ratio {KEEP_RATIO}",
           dense=(times["dense"] * 1e3, "ms"), zipvl=(times["zipvl"] * 1e3, "ms"), speedup=(speedup, "x"),
           kv_bytes_kept=(bytes_kept["zipvl"] / bytes_kept["dense"], "fraction of dense"))  # fmt: skip
