"""Prompts that stay dense: prefill, decode and cache, zipvl over Inductor on the same model, in one run.

    make bench        appends to benchmarks/results/left_dense.jsonl

All of them should be 1.00. "plain" and "room" are the two caches of `passes/keep_every_token.py`, at every length; the
pass takes the first below its `LEAST` tokens and the second above.
"""

from __future__ import annotations

import pytest
import torch
from harness import decoder, interleaved, prompt, report

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.passes import keep_every_token

LAYERS = 4
LENGTHS = [256, 609, 1024, 2048, 4096, 8192]
STEPS = 100
DENSE = 1 << 30  # tokens, of min_tokens: no prompt is that long
#: Options that differ, since Dynamo shares compiled code between models whose options are equal.
BACKENDS = {
    "dense": {"backend": "inductor"},
    "plain": {"backend": "zipvl", "options": {"min_tokens": DENSE}},
    "room": {"backend": "zipvl", "options": {"min_tokens": DENSE + 1}},
}
LEAST = {"plain": DENSE, "room": 0}
DEFAULT_LEAST = keep_every_token.LEAST


def allocated(cache) -> int:
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.benchmark(group="left dense")
@pytest.mark.parametrize("n", LENGTHS)
def test_left_dense(benchmark, monkeypatch, n):
    torch._dynamo.reset()
    ids, token = prompt(n), prompt(1)
    models = {name: decoder(layers=LAYERS) for name in BACKENDS}

    def prefill(name):
        with torch.no_grad():
            return models[name](input_ids=ids, use_cache=True, logits_to_keep=1)

    def step(name, cache):
        with torch.no_grad():
            return models[name](input_ids=token, **as_argument(cache))

    caches, size = {}, {}
    for name, backend in BACKENDS.items():
        models[name].compile(**backend)
        monkeypatch.setattr(keep_every_token, "LEAST", LEAST.get(name, 0))
        caches[name] = cache_of(prefill(name))
        for _ in range(3):  # one static graph, then one for any length
            step(name, caches[name])
        size[name] = allocated(caches[name])
    expected = step("dense", caches["dense"]).logits
    for name in LEAST:
        torch.testing.assert_close(step(name, caches[name]).logits, expected, atol=1e-3, rtol=1e-3)
    first = interleaved({name: lambda name=name: prefill(name) for name in models}, rounds=max(7, 30_000 // n))
    later = interleaved({name: lambda name=name: step(name, caches[name]) for name in models}, rounds=STEPS, warm_up=5)
    benchmark.pedantic(step, args=("plain", caches["plain"]), rounds=3)
    for name in LEAST:
        taken = "plain" if n < DEFAULT_LEAST else "room"
        report("left_dense", "left dense", f"hidden 512, {LAYERS} layers, GQA 4, {n} tokens", name,
               prefill_over_dense=(first[name] / first["dense"], "x"),
               decode_over_dense=(later[name] / later["dense"], "x"),
               cache_over_dense=(size[name] / size["dense"], "x"),
               taken_by_default=(float(name == taken), "1 or 0"))  # fmt: skip
