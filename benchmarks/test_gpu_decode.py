"""Decode steps of a 13B-shaped LLaVA-Next on a GPU, over full and over compacted caches, against Inductor.

    dense          Inductor, over the cache of transformers, which it copies at every step
    dense, static  the same over a static cache, as CUDA graphs (mode="reduce-overhead")
    full cache     zipvl, over a cache that kept every token
    zipvl          over a compacted cache
    zipvl, static  over a compacted static cache, as CUDA graphs
    4 bits         over kept tokens in full and the others at 4 bits

cuDNN is off for dense attention: it would build a plan, which takes 45 ms, at every step. The caches hold what a prompt
left, of which the compacted ones keep random tokens: speed does not depend on which. `make gpu` runs it.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from harness import KEEP_RATIO, interleaved, report
from test_gpu_prefill import SIZES, llava_next
from transformers import DynamicCache, StaticCache

from zipvl_compile.cache.hf_names import as_argument
from zipvl_compile.dynamo import mark_address_as_fixed
from zipvl_compile.kernels.fixed_rows import bucket, fixed_positions, into_bucket
from zipvl_compile.kernels.other_tokens import other_tokens
from zipvl_compile.kernels.quantise_tokens import quantise_tokens
from zipvl_compile.report.stats import stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOM = 256  # tokens


@pytest.fixture(scope="module", params=SIZES)
def models(request):
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = llava_next(SIZES[request.param])
    zipvl = torch.compile(model, backend="zipvl", options={"min_tokens": 0}, dynamic=True)
    recorded = {"min_tokens": 0, "mode": "reduce-overhead"}
    with torch.no_grad():
        yield {
            "size": request.param,
            "dense": torch.compile(model, backend="inductor", dynamic=True), "full cache": zipvl, "zipvl": zipvl,
            "4 bits": zipvl,
            "dense, static": torch.compile(model, backend="inductor", mode="reduce-overhead"),
            "zipvl, static": torch.compile(model, backend="zipvl", options=recorded),
        }  # fmt: skip
    torch.backends.cuda.enable_cudnn_sdp(True)


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
        n = layer.get_seq_length()
        p = int(n * ratio)
        kept = torch.randperm(n, device="cuda")[:p].sort().values
        for name in ("key_buffer", "value_buffer"):
            x = getattr(layer, name)
            room = x.new_empty(*x.shape[:2], p + 256, x.shape[3])
            room[:, :, :p] = x[:, :, kept]
            setattr(layer, name, room)
        layer.positions, layer.prompt_length, layer.cumulative_length = kept[None, None], n, n
    return new


def with_codes(cache: DynamicCache, whole: DynamicCache) -> DynamicCache:
    """Return a compacted cache that holds the other tokens of a whole one at 4 bits."""
    new = copy.deepcopy(cache)
    for layer, every in zip(new.layers, whole.layers, strict=True):
        others = other_tokens(layer.positions, layer.prompt_length)
        k, v = (x[:, :, : layer.prompt_length] for x in (every.key_buffer, every.value_buffer))
        layer.other_keys, layer.key_scales = quantise_tokens(k, others, 4, "channel")
        layer.other_values, layer.value_scales = quantise_tokens(v, others, 4, "token")
    return new


def static(cache: DynamicCache, config) -> StaticCache:
    """Return what a growing cache holds in tensors of fixed size, with room for what a benchmark adds."""
    n = cache.get_seq_length()
    new = StaticCache(config=config, max_cache_len=n + ROOM)
    for layer, other in zip(new.layers, cache.layers, strict=True):
        rows = other.keys.shape[2]
        most = bucket(rows + ROOM) if other.positions is not None else n + ROOM
        for name in ("key_buffer", "value_buffer"):
            x = getattr(other, name)[:, :, :rows]
            setattr(layer, name, torch.cat([x, x.new_zeros(*x.shape[:2], most - rows, x.shape[3])], 2))
        layer.device, layer.is_initialized, layer.batch_size = x.device, True, x.shape[0]
        layer.cumulative_length = torch.tensor(n, device="cuda")
        kept = [layer.key_buffer, layer.value_buffer, layer.cumulative_length]
        if other.positions is not None:
            layer.where = into_bucket(fixed_positions(other.positions, n, ROOM))
            layer.held, layer.prompt_length = torch.tensor(rows, device="cuda"), n
            kept += [layer.where, layer.held]
        for tensor in kept:
            mark_address_as_fixed(tensor)
    return new


def cache_bytes(cache: DynamicCache | StaticCache) -> int:
    """Return how much the tokens in memory take, whatever room there is besides."""
    return sum(2 * layer.keys[:, :, : layer.cached_length].nbytes for layer in cache.layers)


def step(model, cache, batch: int):
    token = torch.ones(batch, 1, dtype=torch.long, device="cuda")
    torch.compiler.cudagraph_mark_step_begin()
    return model(input_ids=token, **as_argument(cache)).logits


def test_a_step_over_a_cache_that_kept_every_token_is_dense(models):
    cache = full_cache(models["dense"].config.text_config, 1000)
    got = step(models["zipvl"], compacted(cache, 1.0), 1).float()
    expected = step(models["dense"], cache, 1).float()
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.99


def test_a_step_over_a_static_cache_is_that_over_a_growing_one(models):
    growing = compacted(full_cache(models["dense"].config.text_config, 1000), KEEP_RATIO)
    fixed = static(growing, models["dense"].config.text_config)
    for _ in range(6):  # recorded, and then replayed
        got, expected = (step(models[name], cache, 1).float() for name, cache in
                         (("zipvl, static", fixed), ("zipvl", growing)))  # fmt: skip
        assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.99


def test_codes_are_read_beside_the_kept_tokens(models):
    whole = full_cache(models["dense"].config.text_config, 1000)
    coded = with_codes(compacted(whole, KEEP_RATIO), whole)
    got, expected = (step(models[name], cache, 1).float() for name, cache in (("4 bits", coded), ("dense", whole)))
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.98


@pytest.mark.parametrize(("n", "batch"), [(16384, 1), (4096, 1), (16384, 8), (4096, 8)])
def test_decode(models, n, batch):
    size = models["size"]
    if size == "13B" and n * batch > 40_000:
        pytest.skip("the dense cache needs more memory than most GPUs have")
    config = models["dense"].config.text_config
    dense = full_cache(config, n)
    caches = {"dense": dense, "full cache": compacted(dense, 1.0), "zipvl": compacted(dense, KEEP_RATIO)}
    caches["4 bits"] = with_codes(caches["zipvl"], dense)
    if size == "13B":
        del caches["full cache"]
    for cache in caches.values():
        if batch > 1:
            cache.batch_repeat_interleave(batch)
    if size != "13B":
        caches |= {f"{name}, static": static(caches[name], config) for name in ("dense", "zipvl")}
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    held["4 bits"] = stats(caches["4 bits"]).bytes_used
    weights = sum(p.nbytes for name, p in models["dense"].named_parameters() if "language" in name)
    run = {name: lambda name=name: step(models[name], caches[name], batch) for name in caches}
    times = interleaved(run, rounds=15, warm_up=4)
    speedup, bound = times["dense"] / times["zipvl"], (weights + held["dense"]) / (weights + held["zipvl"])
    metrics = {
        "dense": (times["dense"] * 1e3, "ms"), "zipvl": (times["zipvl"] * 1e3, "ms"), "speedup": (speedup, "x"),
        "bound": (bound, "x"), "speedup_over_bound": (speedup / bound, "fraction"),
        "bandwidth": ((weights + held["zipvl"]) / times["zipvl"] / 1e12, "TB/s"),
        "kv_bytes_kept": (held["zipvl"] / held["dense"], "fraction of dense"),
    }  # fmt: skip
    if "zipvl, static" in times:
        metrics |= {
            "static": (times["zipvl, static"] * 1e3, "ms"), "dense_static": (times["dense, static"] * 1e3, "ms"),
            "static_over_dense_static": (times["dense, static"] / times["zipvl, static"], "x"),
            "static_bandwidth": ((weights + held["zipvl"]) / times["zipvl, static"] / 1e12, "TB/s"),
        }  # fmt: skip
    metrics |= {
        "coded": (times["4 bits"] * 1e3, "ms"), "coded_speedup": (times["dense"] / times["4 bits"], "x"),
        "coded_kv_bytes": (held["4 bits"] / held["dense"], "fraction of dense"),
    }  # fmt: skip
    if "full cache" in times:
        metrics["over_full_cache"] = (times["full cache"] / times["zipvl"], "x")
    if batch > 1:  # the memory that the dense cache took now holds a larger batch
        more = int(batch / KEEP_RATIO)
        caches.clear()
        cache = compacted(dense := full_cache(config, n), KEEP_RATIO)
        del dense
        cache.batch_repeat_interleave(more)
        taken = interleaved({"zipvl": lambda: step(models["zipvl"], cache, more)}, rounds=15, warm_up=4)["zipvl"]
        rate = {"dense": batch / times["dense"], "zipvl": more / taken}
        metrics |= {
            "batch_in_the_same_memory": (more, "samples"), "throughput_dense": (rate["dense"], "tokens/s"),
            "throughput": (rate["zipvl"], "tokens/s"), "throughput_ratio": (rate["zipvl"] / rate["dense"], "x"),
        }  # fmt: skip
    report("gpu", "decode", f"{size}, {n} tokens, batch {batch}, bf16", f"keep_ratio {KEEP_RATIO}", **metrics)
