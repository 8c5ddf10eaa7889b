"""Prefill of one layer and of a whole 13B-shaped LLaVA-Next on a GPU, against Inductor with the best SDPA backend.

Weights are random; `keep_ratio` is what the paper keeps. `make gpu` runs it.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from harness import KEEP_RATIO, amdahl, device_times, interleaved, report
from test_gpu_kernels import dense_backends, draw
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = [4096, 16384, 32768, 65536]
LAYERS = {"one layer": 1, "13B": 40}


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


def prefill(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


@pytest.fixture(scope="module", params=LAYERS)
def models(request):
    """Return the size's name and the compiled forms of one model, compiled once for every length."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model = llava_next(LAYERS[request.param])
    options = {"keep_ratio": KEEP_RATIO, "min_tokens": 0}
    yield request.param, {
        "dense": torch.compile(model, backend="inductor", dynamic=True),
        "zipvl": torch.compile(model, backend="zipvl", options=options, dynamic=True),
        "exact": torch.compile(model, backend="zipvl", options={"tau": 1.0, "min_tokens": 0}, dynamic=True),
    }


@pytest.mark.parametrize("n", LENGTHS)
def test_prefill(models, n):
    size, (dense, zipvl, exact) = models[0], models[1].values()
    ids = torch.randint(0, 32000, (1, n), device="cuda", generator=torch.Generator("cuda").manual_seed(n))
    try:
        expected = prefill(dense, ids)
        # The figure counts only if keeping every token gives the dense answer, and keeping some a finite one.
        if size == "one layer":
            got = prefill(exact, ids)
            assert F.cosine_similarity(got.float().flatten(), expected.float().flatten(), 0) > 0.99
        assert prefill(zipvl, ids).isfinite().all()
        times = interleaved({"dense": lambda: prefill(dense, ids), "zipvl": lambda: prefill(zipvl, ids)}, rounds=5)
    except torch.OutOfMemoryError:
        pytest.skip(f"{size} at {n} tokens needs more memory than this GPU has")
    bound = amdahl(times["dense"], attention_seconds(n, LAYERS[size]), KEEP_RATIO**2)
    speedup = times["dense"] / times["zipvl"]
    report("gpu", "prefill_13b" if size == "13B" else "prefill_layer", f"{n} tokens, bf16", f"keep_ratio {KEEP_RATIO}",
           dense=(times["dense"] * 1e3, "ms"), zipvl=(times["zipvl"] * 1e3, "ms"), speedup=(speedup, "x"),
           bound=(bound, "x"), speedup_over_bound=(speedup / bound, "fraction"))  # fmt: skip
