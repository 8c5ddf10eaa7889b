"""Decode steps of a Llama-like decoder on CPUs, over caches that grow and static ones, against Inductor, in one run.

    dense             Inductor over DynamicCache, which it copies at every step
    dense, static     Inductor over StaticCache
    zipvl             over the compacted cache that a prompt left
    zipvl, static     the same in tensors of fixed size
    full cache        zipvl over a cache that kept every token

What the bytes allow is the ratio of weights and cache, dense to compacted. `make bench` appends to decode.jsonl.
"""

from __future__ import annotations

import copy

import pytest
import torch
from harness import KEEP_RATIO, decoder, interleaved, prompt, report
from transformers import DynamicCache, StaticCache

from zipvl_compile.cache.hf_names import as_argument

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs; GPUs have test_gpu_decode")
LAYERS, ROOM = 8, 128
KEPT = {"policy": "paper", "keep_ratio": KEEP_RATIO, "min_tokens": 0}
VARIANTS = {
    "dense": ({"backend": "inductor"}, False),
    "dense, static": ({"backend": "inductor"}, True),
    "zipvl": ({"backend": "zipvl", "options": KEPT}, False),
    "zipvl, static": ({"backend": "zipvl", "options": KEPT}, True),
    "full cache": ({"backend": "zipvl", "options": {"tau": 1.0, "min_tokens": 0}}, False),
}


@pytest.fixture(autouse=True)
def no_gradients():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def filled(model, ids, static: bool, batch: int):
    """Return the cache that a prompt leaves, for `batch` samples."""
    n = ids.shape[1]
    made = StaticCache(config=model.config, max_cache_len=n + ROOM) if static else DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **as_argument(made))
    if batch > 1:
        for layer in made.layers:
            layer.batch_repeat_interleave(batch)
    return made


def bytes_in_use(cache) -> int:
    """Return how much memory the tokens of a cache take."""
    return sum(layer.keys[:, :, : int(layer.get_seq_length())].nbytes * 2 for layer in cache.layers)


def allocated(cache) -> int:
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("n", [64, 4096, 16384, 32768])
@pytest.mark.parametrize("hidden", [64, 512])
def test_a_step(benchmark, hidden, n, batch):
    if (hidden == 64) != (n == 64) or n * batch > 140_000:
        pytest.skip("a small model shows what the host takes, a large one what the bytes take")
    models, caches, ids, token = {}, {}, prompt(n), prompt(1, batch)
    for name, (how, static) in VARIANTS.items():
        models[name] = decoder(hidden, LAYERS)
        if name != "dense, static":  # Inductor fills a static cache as transformers does, outside of the graph
            models[name].compile(**how)
        caches[name] = filled(models[name], ids, static, batch)
        if name == "dense, static":
            models[name].compile(**how)
    run = {
        name: lambda model=model, name=name: model(input_ids=token, **as_argument(caches[name])).logits
        for name, model in models.items()
    }
    same = copy.deepcopy(caches["zipvl"])
    eager = decoder(hidden, LAYERS)
    eager.compile(backend="zipvl", options=KEPT | {"inner": "eager"})
    expected = eager(input_ids=token, **as_argument(same)).logits
    for name in ("zipvl", "zipvl, static"):
        torch.testing.assert_close(run[name](), expected, atol=1e-3, rtol=1e-3)
    times = interleaved(run, rounds=15 if n > 64 else 60, warm_up=5)
    benchmark.pedantic(run["zipvl, static"], rounds=5)
    weights = sum(p.nbytes for name, p in models["dense"].named_parameters() if "embed" not in name)
    held = {name: bytes_in_use(cache) for name, cache in caches.items()}
    case = f"hidden {hidden}, {LAYERS} layers, GQA 4, {n} tokens, batch {batch}"
    for name in VARIANTS:
        report(
            "decode", "step", case, name, time=(times[name] * 1e3, "ms"), speedup=(times["dense"] / times[name], "x"),
            over_static=(times["dense, static"] / times[name], "x"),
            bound=((weights + held["dense"]) / (weights + held[name]), "x"),
            kv_in_use=(held[name] / 2**20, "MB"), kv_allocated=(allocated(caches[name]) / 2**20, "MB"),
        )  # fmt: skip
