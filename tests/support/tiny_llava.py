"""A tiny random LLaVA: 2 CLIP layers, 2 Llama layers, GQA 2, 64 image tokens."""

from __future__ import annotations

import functools

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, PAD, BOS = 5, 0, 1
IMAGE_TOKENS = 64


@functools.lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = _build().state_dict()
    # Wider than Hugging Face's initialisation, so that attention is not uniform and tokens differ.
    return {
        name: torch.randn(value.shape, generator=generator) * 0.15
        if value.is_floating_point() and value.dim() > 1
        else value
        for name, value in state.items()
    }


def _build() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = LlavaForConditionalGeneration(config).eval()
    built.generation_config.eos_token_id = None  # generate to the full length
    built.generation_config.pad_token_id = PAD
    return built


def model() -> LlavaForConditionalGeneration:
    """Return the eager model; every call gives the same weights."""
    built = _build()
    built.load_state_dict(_weights())
    return built


def compiled(**options) -> LlavaForConditionalGeneration:
    """Return the model compiled in place with zipvl, by default without Inductor and for prompts of any length."""
    built = model()
    built.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0} | options)
    return built


@functools.cache
def shared(**options) -> LlavaForConditionalGeneration:
    """Return one compiled model per set of options, so that tests share its compiled graphs. Do not change it."""
    return compiled(**options)


def inputs(batch: int = 1, text: int = 12, pad: int = 0, side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a prompt of 1 + 64 + `text` tokens a sample; the first sample has `pad` of them replaced by padding."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(6, 128, (batch, text), generator=generator)
    ids = torch.cat([torch.full((batch, 1), BOS), torch.full((batch, IMAGE_TOKENS), IMAGE), words], 1)
    mask = torch.ones_like(ids)
    if pad:
        short = ids[0, : ids.shape[1] - pad]
        filler, shown = torch.full((pad,), PAD), torch.zeros(pad, dtype=torch.long)
        left = side == "left"
        ids[0] = torch.cat([filler, short] if left else [short, filler])
        ones = torch.ones_like(short)
        mask[0] = torch.cat([shown, ones] if left else [ones, shown])
    pixels = torch.randn(batch, 3, 64, 64, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def prefill(f, x: dict[str, torch.Tensor]):
    """Run the prompt through `f` and return its output, as a manual loop does."""
    with torch.no_grad():
        return f(**x, use_cache=True)


def prompt_cache(f, x: dict[str, torch.Tensor]):
    """Return the cache that a prompt leaves."""
    from zipvl_compile.cache.hf_names import cache_of  # not above: some tests must not load the package by this import

    return cache_of(prefill(f, x))


def step(f, token: torch.Tensor, cache):
    """Run tokens `[B, m]` on a cache and return the output."""
    from zipvl_compile.cache.hf_names import as_argument  # as above

    with torch.no_grad():
        return f(input_ids=token, **as_argument(cache), use_cache=True)
