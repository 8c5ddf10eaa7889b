"""Idefics, SmolVLM, and cross-attention layers between the decoder layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from families.family import (
    BOS,
    EOS,
    FIRST_WORD,
    HIDDEN,
    IMAGE,
    PAD,
    REWRITTEN,
    VOCAB,
    Family,
    images,
    text_args,
    vision_args,
)
from torch import Generator, Tensor


def _idefics3() -> hf.PreTrainedModel:
    vision = vision_args(image_size=32, patch_size=4)
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**text_args()), vision_config=vision, image_token_id=IMAGE, scale_factor=2
    )
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> hf.PreTrainedModel:
    vision = vision_args(patch_size=4)
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**text_args()), vision_config=vision, image_token_id=IMAGE, scale_factor=4
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _idefics2() -> hf.PreTrainedModel:
    config = hf.Idefics2Config(
        text_config=hf.MistralConfig(**text_args(), sliding_window=None), vision_config=vision_args(patch_size=4),
        perceiver_config={
            "hidden_size": HIDDEN, "resampler_n_latents": 16, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 16, "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    return hf.Idefics2ForConditionalGeneration(config)


def open_gates(model: hf.PreTrainedModel, name: str, value: float) -> hf.PreTrainedModel:
    """Return the model with its gates of one number set: they are zeros, which leave the image without effect."""
    for path, gate in model.named_parameters():
        if name in path and gate.numel() == 1:
            gate.data.fill_(value)
    return model


def _idefics() -> hf.PreTrainedModel:
    vision = vision_args()
    config = hf.IdeficsConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, cross_layer_interval=1,
        vision_config=vision | {"embed_dim": vision.pop("hidden_size")}, qk_layer_norms=True, use_resampler=True,
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 16, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 16,
        },
    )  # fmt: skip
    return open_gates(hf.IdeficsForVisionText2Text(config), "alpha", 0.3)


def _mllama() -> hf.PreTrainedModel:
    vision = vision_args(num_global_layers=1, vision_output_dim=64, max_num_tiles=4, intermediate_layers_indices=[1])
    vision["attention_heads"] = vision.pop("num_attention_heads")
    config = hf.MllamaConfig(
        text_config=text_args(num_hidden_layers=3, cross_attention_layers=[1]), vision_config=vision,
        image_token_index=IMAGE,
    )  # fmt: skip
    return open_gates(hf.MllamaForConditionalGeneration(config), "gate", 1.0)


def long_text(batch: int, words: int, generator: Generator) -> Tensor:
    text = torch.randint(FIRST_WORD, VOCAB, (batch, 64 + words), generator=generator)
    return torch.cat([torch.tensor([[BOS, IMAGE]]).expand(batch, -1), text], 1)


def _sees(*shape: int) -> Callable[[Tensor], Tensor]:
    """Return what lets every token attend to all images or tiles."""
    return lambda ids: torch.ones(*ids.shape, *shape, dtype=torch.long)


FAMILIES = {
    "idefics2": Family(_idefics2, images(5, 3, 64, 64), image_tokens=5 * 16, text_model="model.text_model"),
    "idefics": Family(
        _idefics,
        images(2, 3, 64, 64),
        prompt=long_text,
        by_token={"image_attention_mask": _sees(2)},
        decoder=("cross-attention", REWRITTEN, "cross-attention", REWRITTEN),
        text_model="model",
    ),
    "mllama": Family(
        _mllama,
        images(1, 4, 3, 64, 64, aspect_ratio_ids=[6], aspect_ratio_mask=[[1, 1, 1, 1]]),
        prompt=long_text,
        by_token={"cross_attention_mask": _sees(1, 4)},
        decoder=(REWRITTEN, "cross-attention", REWRITTEN),
    ),
    "idefics3": Family(_idefics3, images(5, 3, 32, 32), image_tokens=5 * 16, text_model="model.text_model"),
    "smolvlm": Family(_smolvlm, images(5, 3, 64, 64), image_tokens=5 * 16, text_model="model.text_model"),
}
