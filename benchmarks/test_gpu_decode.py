"""Decode steps of a whole 13B-shaped LLaVA-Next on a GPU, over full and over compacted caches, against Inductor.

The caches hold what a prompt left, of which the compacted ones keep random tokens: speed does not depend on which.
`make gpu` runs it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from harness import KEEP_RATIO, interleaved, report
from test_gpu_prefill import llava_next
from transformers import DynamicCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def models():
    torch._dynamo.reset()
    model = llava_next(40)
    with torch.no_grad():
        yield {
            "dense": torch.compile(model, backend="inductor", dynamic=True),
            "zipvl": torch.compile(model, backend="zipvl", options={"min_tokens": 0}, dynamic=True),
        }


def full_cache(config, n: int) -> DynamicCache:
    """Return a cache of `n` random tokens, as a prompt leaves it."""
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        k, v = torch.randn(2, 1, config.num_key_value_heads, n, config.head_dim, device="cuda", dtype=torch.bfloat16)
        cache.update(k, v, layer)
    return cache


def compacted(cache: DynamicCache, ratio: float) -> DynamicCache:
    """Return the cache of a sparse prefill that kept this share of the tokens."""
    new = copy.deepcopy(cache)
    for layer in new.layers:
        n = layer.cumulative_length
        p = int(n * ratio)
        kept = torch.randperm(n, device="cuda")[:p].sort().values
        for name in ("key_buffer", "value_buffer"):
            x = getattr(layer, name)
            room = x.new_empty(*x.shape[:2], p + 256, x.shape[3])
            room[:, :, :p] = x[:, :, kept]
            setattr(layer, name, room)
        layer.kept, layer.prompt_length = kept[None, None], n
    return new


def cache_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def step(model, cache, batch: int):
    token = torch.ones(batch, 1, dtype=torch.long, device="cuda")
    return model(input_ids=token, past_key_values=cache).logits


def test_a_step_over_a_cache_that_kept_every_token_is_dense(models):
    cache = full_cache(models["dense"].config.text_config, 1000)
    got = step(models["zipvl"], compacted(cache, 1.0), 1).float()
    expected = step(models["dense"], cache, 1).float()
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.99


@pytest.mark.parametrize(("n", "batch"), [(16384, 1), (4096, 8)])
def test_decode(models, n, batch):
    config = models["dense"].config.text_config
    caches = {"dense": full_cache(config, n)}
    caches["zipvl"] = compacted(caches["dense"], KEEP_RATIO)
    for cache in caches.values():
        if batch > 1:
            cache.batch_repeat_interleave(batch)
    size = {name: cache_bytes(cache) for name, cache in caches.items()}
    weights = sum(p.nbytes for name, p in models["dense"].named_parameters() if "language" in name)
    run = {name: lambda name=name: step(models[name], caches[name], batch) for name in caches}
    times = interleaved(run, rounds=15, warm_up=4)
    speedup, bound = times["dense"] / times["zipvl"], (weights + size["dense"]) / (weights + size["zipvl"])
    metrics = {
        "dense": (times["dense"] * 1e3, "ms"), "zipvl": (times["zipvl"] * 1e3, "ms"), "speedup": (speedup, "x"),
        "bound": (bound, "x"), "speedup_over_bound": (speedup / bound, "fraction"),
        "bandwidth": ((weights + size["zipvl"]) / times["zipvl"] / 1e12, "TB/s"),
        "kv_bytes_kept": (size["zipvl"] / size["dense"], "fraction of dense"),
    }  # fmt: skip
    if batch > 1:  # the memory that the dense cache took now holds a larger batch
        more = int(batch / KEEP_RATIO)
        caches.clear()
        cache = compacted(full_cache(config, n), KEEP_RATIO)
        cache.batch_repeat_interleave(more)
        taken = interleaved({"zipvl": lambda: step(models["zipvl"], cache, more)}, rounds=15, warm_up=4)["zipvl"]
        rate = {"dense": batch / times["dense"], "zipvl": more / taken}
        metrics |= {
            "batch_in_the_same_memory": (more, "samples"), "throughput_dense": (rate["dense"], "tokens/s"),
            "throughput": (rate["zipvl"], "tokens/s"), "throughput_ratio": (rate["zipvl"] / rate["dense"], "x"),
        }  # fmt: skip
    report("gpu", "decode_13b", f"{n} tokens, batch {batch}, bf16", f"keep_ratio {KEEP_RATIO}", **metrics)
