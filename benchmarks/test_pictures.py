"""Prefill and decode by `generate`, of an LVLM that is shown one picture: what users run.

    make bench        appends to benchmarks/results/pictures.jsonl

A LLaVA whose decoder has hidden 1,024, 12 layers, GQA 4, and a small vision tower that gives 576 to 4,096 image tokens.
Dense (Inductor) and zipvl answer in turns. A random model's attention is even, so that tau keeps what it would hardly
keep of a real one: `keep_ratio` says what is kept, but for the row "by default", where nothing is told.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness import KEEP_RATIO, interleaved, report
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from zipvl_compile.cache.hf_names import cache_of

IMAGE, PATCH, HIDDEN, LAYERS, TEXT, NEW = 5, 4, 1024, 12, 16, 16
SIDES = [24, 48, 64]  # of the picture, in tokens
FIXED = {"keep_ratio": KEEP_RATIO}
VARIANTS = {
    "by default": {},
    "preset fast": FIXED | {"preset": "fast"},
    "paper": FIXED | {"policy": "paper"},
    "skip layers": FIXED | {"policy": "skip_layers"},
}


def lvlm(side: int) -> LlavaForConditionalGeneration:
    """Return a randomly initialised LLaVA for pictures of `side` x `side` tokens; every call gives the same weights."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1, image_size=side * PATCH,
        patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=HIDDEN * 11 // 4, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1 << 15,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=side * side,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None  # generate to the full length
    model.generation_config.pad_token_id = 0
    return model


def question(side: int) -> dict[str, torch.Tensor]:
    """Return one picture and a few words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(6, 256, (1, TEXT), generator=generator)
    ids = torch.cat([torch.full((1, 1), 1), torch.full((1, side * side), IMAGE), words], 1)
    pixels = torch.randn(1, 3, side * PATCH, side * PATCH, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def answer(model, inputs, tokens: int):
    """Generate so many tokens."""
    return model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, return_dict_in_generate=True
    )


@pytest.mark.benchmark(group="pictures")
@pytest.mark.parametrize("side", SIDES)
def test_an_answer_about_a_picture(benchmark, side):
    torch._dynamo.reset()
    inputs, models = question(side), {"dense": lvlm(side)}
    models["dense"].compile(backend="inductor")
    for name, options in VARIANTS.items():
        models[name] = lvlm(side)
        models[name].compile(backend="zipvl", options=options)
    caches = {name: cache_of(answer(model, inputs, NEW)) for name, model in models.items()}
    kept = {name: sum(layer.keys.nbytes for layer in cache.layers) for name, cache in caches.items()}
    first = {name: functools.partial(answer, model, inputs, 1) for name, model in models.items()}
    whole = {name: functools.partial(answer, model, inputs, NEW) for name, model in models.items()}
    rounds = max(3, 4_000 // side**2)
    to_first, to_last = interleaved(first, rounds), interleaved(whole, rounds, warm_up=1)
    decode = {name: (to_last[name] - to_first[name]) / (NEW - 1) for name in models}
    benchmark.pedantic(first["paper"], rounds=1)
    case = f"hidden {HIDDEN}, {LAYERS} layers, GQA 4, a picture of {side * side} tokens"
    for name in VARIANTS:
        report(
            "pictures", "generate", case, name,
            dense=(to_first["dense"] * 1e3, "ms"), zipvl=(to_first[name] * 1e3, "ms"),
            speedup=(to_first["dense"] / to_first[name], "x"),
            decode_dense=(decode["dense"] * 1e3, "ms"), decode_zipvl=(decode[name] * 1e3, "ms"),
            decode_speedup=(decode["dense"] / decode[name], "x"),
            kv_bytes=(kept[name] / kept["dense"], "fraction of dense"),
        )  # fmt: skip
