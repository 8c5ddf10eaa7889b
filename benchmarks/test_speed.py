"""Prefill and generate of a Llama-like decoder, zipvl against Inductor, in one run.

    make bench        appends to benchmarks/results/speed.jsonl and draws benchmarks/results/speed.png

A benchmark first checks its result against the same graph without Inductor, and reports nothing where it is wrong.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import KEEP_RATIO, amdahl, decoder, interleaved, prompt, report

from zipvl_compile.passes.cost_model import AttentionShape, seconds
from zipvl_compile.pipeline import leaving_out
from zipvl_compile.report.machine import machine, sparse_prefill_attention

LAYERS = 8
LENGTHS = [1024, 2048, 4096, 8192, 16384] if not torch.cuda.is_available() else [4096, 8192, 16384, 32768]
FILE = "gpu_speed" if torch.cuda.is_available() else "speed"
CASE = f"hidden 512, {LAYERS} layers, GQA 4"
OPTIONS = {"policy": "paper", "keep_ratio": KEEP_RATIO, "min_tokens": 0}


def attention(model, n: int):
    """Return a run of the causal attention of one layer over `n` tokens."""
    config = model.config
    shape = (1, config.num_attention_heads, n, config.head_dim)
    q, k, v = torch.randn(3, *shape, device=model.device, dtype=model.dtype)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


# Dynamo shares compiled code between models whose options are equal; other spellings keep the unpruned apart.
UNPRUNED = OPTIONS | {"keep_recent": 1}
BACKENDS = {
    "dense": {"backend": "inductor"},
    "unpruned": {"backend": "zipvl", "options": UNPRUNED},  # nothing but the attention itself is smaller
    "unpruned projections": {"backend": "zipvl", "options": UNPRUNED | {"seed": 0}},
    "zipvl": {"backend": "zipvl", "options": OPTIONS},
    "queries all": {"backend": "zipvl", "options": OPTIONS | {"unselected": "all"}},
    "check": {"backend": "zipvl", "options": OPTIONS | {"inner": "eager"}},
}

LEFT_OUT = {"unpruned": ("prune_projections", "demand_rows"), "unpruned projections": ("prune_projections",)}


def variants(n: int, *names: str, dynamic: bool | None = False) -> dict:
    """Return compiled models by name, each after one prompt of `n` tokens; "eager" is not compiled."""
    torch._dynamo.reset()
    made = {}
    for name in names:
        made[name] = decoder(layers=LAYERS)
        if name in BACKENDS:
            made[name].compile(**BACKENDS[name], dynamic=dynamic)
        with leaving_out(*LEFT_OUT.get(name, ())):
            prefill(made[name], prompt(n))
    return made


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def prefill(model, ids):
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill(benchmark, n):
    slow = ["eager", "queries all"] if n <= 4096 or torch.cuda.is_available() else []
    models, ids = variants(n, "dense", "unpruned", "unpruned projections", "zipvl", *slow, "check"), prompt(n)
    expected = prefill(models["check"], ids).logits
    for name in ("zipvl", "unpruned projections", "unpruned"):
        torch.testing.assert_close(prefill(models[name], ids).logits, expected, atol=1e-3, rtol=1e-3)
    del models["check"]
    run = {name: lambda model=model: prefill(model, ids) for name, model in models.items()}
    run["attention"] = attention(models["dense"], n)  # in turn with the rest, since the bound rests on it
    times = interleaved(run, rounds=max(5, min(25, 20_000 // n)), warm_up=1)
    benchmark.pedantic(prefill, args=(models["zipvl"], ids), rounds=3)
    dense, of_attention = times["dense"], times.pop("attention") * LAYERS
    bound = amdahl(dense, of_attention, KEEP_RATIO**2)
    benchmark.extra_info.update(speedup=dense / times["zipvl"], bound=bound)
    for name, taken in times.items():
        if name != "dense":
            report(FILE, "prefill", f"{CASE}, {n} tokens", name,
                   dense=(dense * 1e3, "ms"), zipvl=(taken * 1e3, "ms"), speedup=(dense / taken, "x"),
                   bound=(bound, "x"), speedup_over_bound=(dense / taken / bound, "fraction"))  # fmt: skip


@pytest.mark.benchmark(group="generate")
@pytest.mark.parametrize("n", LENGTHS[1:2])
def test_generate(benchmark, n):
    """A prompt and 32 new tokens, end to end."""
    torch._dynamo.reset()
    models = {"dense": decoder(layers=LAYERS), "zipvl": decoder(layers=LAYERS)}
    models["zipvl"].compile(backend="zipvl", options=OPTIONS)
    models["dense"].compile(backend="inductor")
    ids = prompt(n)
    run = {
        name: lambda model=model: model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)
        for name, model in models.items()
    }
    times = interleaved(run, rounds=5)
    assert run["zipvl"]().shape == run["dense"]().shape
    benchmark.pedantic(run["zipvl"], rounds=3)
    report(FILE, "generate 32 tokens", f"{CASE}, {n} tokens", "zipvl",
           dense=(times["dense"] * 1e3, "ms"), zipvl=(times["zipvl"] * 1e3, "ms"),
           speedup=(times["dense"] / times["zipvl"], "x"))  # fmt: skip


@pytest.mark.benchmark(group="selection")
@pytest.mark.parametrize("n", LENGTHS)
def test_cost_model_predicts_the_time_of_an_attention(benchmark, n):
    """What the cost model says of one attention, dense and sparse, beside what it takes."""
    q, k, v = (torch.randn(1, heads, n, 64) for heads in (8, 2, 2))
    shape = AttentionShape(1, 8, 2, 64, 64, 128, 4)
    taken = interleaved(
        {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            "zipvl": lambda: sparse_prefill_attention(q, k, v, keep_ratio=KEEP_RATIO),
        },
        rounds=9,
    )
    benchmark.pedantic(sparse_prefill_attention, args=(q, k, v), kwargs={"keep_ratio": KEEP_RATIO}, rounds=3)
    predicted = dict(zip(("dense", "zipvl"), seconds(shape, machine(q.device, q.dtype), n, KEEP_RATIO), strict=True))
    ratio = predicted["dense"] / predicted["zipvl"] / (taken["dense"] / taken["zipvl"])
    assert 0.6 < ratio < 1.6, f"predicted speedup over measured: {ratio:.2f}"
    for name in taken:
        report("cost_model", "one attention", f"8 heads, 2 KV heads, head_dim 64, {n} tokens", name,
               measured=(taken[name] * 1e3, "ms"), predicted=(predicted[name] * 1e3, "ms"),
               predicted_over_measured=(predicted[name] / taken[name], "fraction"))  # fmt: skip
