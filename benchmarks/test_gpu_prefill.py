"""Prefill of a 13B-shaped LLaVA-Next on a GPU, of 8 layers and whole, against Inductor with the best SDPA backend.

    dense           the model as transformers compiles it: with its mask in memory, since it was given an attention mask
    dense causal    without that mask, by the causal flag of scaled_dot_product_attention: the fastest dense prefill
    zipvl           sparse
    skipped layers  tokens pass the layers that do not keep them, all but the first two
    zipvl exact     every layer left dense, by zipvl: no mask where the attention mask hides nothing

Weights are random; `keep_ratio` is what the paper keeps. `make gpu` runs it.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from harness import KEEP_RATIO, SKIPPING, amdahl, device_times, interleaved, report
from test_gpu_kernels import dense_backends, draw
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = [576, 2880, 4096, 8192, 16384, 32768, 65536]
SIZES = {"8 layers of 13B": 8, "13B": 40}


def causal_attention(module, q, k, v, attention_mask, scaling=None, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scaling).transpose(1, 2), None


AttentionInterface.register("causal", causal_attention)
AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)


def llava_next(layers: int) -> LlavaNextForConditionalGeneration:
    """Return LLaVA-Next with Vicuna-13B's decoder shapes, in bf16; prompts here are text, so the tower is small."""
    text = LlamaConfig(
        vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=layers,
        num_attention_heads=40, num_key_value_heads=40, max_position_embeddings=1 << 17,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=vision, text_config=text))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


def attention_seconds(n: int, layers: int) -> float:
    """Return the time of the dense causal attention of all layers with the fastest backend."""
    q, k, v = (draw(1, 40, n, 128, seed=i) for i in range(3))
    return min(device_times(dense_backends(q, k, v), rounds=5, warm_up=2).values()) * layers


def without_mask(model):
    """Return the model, over the same weights, with attention that is causal by its flag."""
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    other.set_attn_implementation("causal")
    return other


def prefill(model, ids):
    """Run a prompt as `generate` does: with an attention mask, for the logits of the last token."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1).logits


@pytest.fixture(scope="module", params=SIZES)
def models(request):
    """Return the size's name and the compiled forms of one model, compiled once for every length."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model = llava_next(SIZES[request.param])
    options = {"policy": "paper", "keep_ratio": KEEP_RATIO, "min_tokens": 0}
    yield (
        request.param,
        {
            "dense": torch.compile(model, backend="inductor", dynamic=True),
            "dense causal": torch.compile(without_mask(model), backend="inductor", dynamic=True),
            "zipvl": torch.compile(model, backend="zipvl", options=options, dynamic=True),
            "balanced": torch.compile(
                model, backend="zipvl", options={"policy": "union", "keep_ratio": 0.55, "min_tokens": 0}, dynamic=True
            ),
            "skipped layers": torch.compile(model, backend="zipvl", options=SKIPPING | {"min_tokens": 0}, dynamic=True),
            "zipvl exact": torch.compile(model, backend="zipvl", options={"min_tokens": 1 << 40}, dynamic=True),
        },
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_prefill(models, n):
    size, compiled = models
    ids = torch.randint(0, 32000, (1, n), device="cuda", generator=torch.Generator("cuda").manual_seed(n))
    run = {name: lambda f=f: prefill(f, ids) for name, f in compiled.items()}
    try:
        expected = run["dense"]()
        for name in ("dense causal", "zipvl exact"):
            assert F.cosine_similarity(run[name]().float().flatten(), expected.float().flatten(), 0) > 0.99
        assert all(run[name]().isfinite().all() for name in ("zipvl", "balanced", "skipped layers"))
        times = interleaved(run, rounds=5, warm_up=1)
    except torch.OutOfMemoryError:
        pytest.skip(f"{size} at {n} tokens needs more memory than this GPU has")
    bound = amdahl(times["dense causal"], attention_seconds(n, SIZES[size]), KEEP_RATIO**2)
    speedup = times["dense causal"] / times["zipvl"]
    report("gpu", "prefill", f"{size}, {n} tokens, bf16", f"keep_ratio {KEEP_RATIO}",
           dense=(times["dense"] * 1e3, "ms"), dense_causal=(times["dense causal"] * 1e3, "ms"),
           zipvl=(times["zipvl"] * 1e3, "ms"), speedup_over_dense=(times["dense"] / times["zipvl"], "x"),
           speedup=(speedup, "x"), bound=(bound, "x"), speedup_over_bound=(speedup / bound, "fraction"),
           balanced=(times["balanced"] * 1e3, "ms"), balanced_speedup=(times["dense causal"] / times["balanced"], "x"),
           skipped_layers=(times["skipped layers"] * 1e3, "ms"),
           skipped_layers_speedup=(times["dense causal"] / times["skipped layers"], "x"),
           exact=(times["zipvl exact"] * 1e3, "ms"),
           exact_over_dense=(times["dense"] / times["zipvl exact"], "x"))  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2])
def test_keeping_every_token_gives_the_dense_answer(layers):
    torch._dynamo.reset()
    model = llava_next(layers)
    exact = torch.compile(model, backend="zipvl", options={"tau": 1.0, "min_tokens": 0}, dynamic=True)
    ids = torch.randint(0, 32000, (1, 3000), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    got, expected = prefill(exact, ids), prefill(model, ids)
    assert F.cosine_similarity(got.float().flatten(), expected.float().flatten(), 0) > 0.99
