"""Tiny random vision-language models of eleven Hugging Face families, built from configs, and prompts for them.

`model(family)` gives an eager model, `compiled(family, tau=...)` the same model compiled in place with zipvl, and
`inputs(family, ...)` a prompt of mostly image tokens with everything that the family's `generate` and `forward` take.
Every decoder has 2 layers, hidden size 64, 4 query heads and, where the family has GQA, 2 KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor

VOCAB, PAD, BOS, EOS, IMAGE, VIDEO, START, END, FIRST_WORD = 200, 0, 1, 2, 5, 6, 7, 8, 10
HIDDEN = 64


@dataclass(frozen=True)
class Family:
    """How to build a family, and how its prompts look.

    Attributes:
        build: gives the model with Hugging Face's own weights.
        pixels: gives the image arguments of `batch` samples.
        image_tokens: image tokens of one sample (tokens).
        around: tokens directly before and after the image tokens.
        by_token: further arguments of shape `[batch, n]`, made from `input_ids`.
        text_model: path of the decoder.
        layer_types: of the decoder's layers.
    """

    build: Callable[[], hf.PreTrainedModel]
    pixels: Callable[[int, Generator], dict[str, Tensor]]
    image_tokens: int = 64
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    by_token: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    text_model: str = "model.language_model"
    layer_types: tuple[str, ...] = ("full_attention", "full_attention")


def _text(**changes: Any) -> dict[str, Any]:
    """Return the arguments that nearly every text config takes."""
    return {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False,
    } | changes  # fmt: skip


def _vision(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a vision transformer over 64 x 64 pixels in 8 x 8 patches."""
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 8,
    } | changes  # fmt: skip


def _images(*size: int, **extra: list[int]) -> Callable[[int, Generator], dict[str, Tensor]]:
    """Return pixels of shape `[batch, *size]`, with one row of every `extra` integer argument a sample."""

    def pixels(batch: int, generator: Generator) -> dict[str, Tensor]:
        rows = {name: torch.tensor([row] * batch) for name, row in extra.items()}
        return {"pixel_values": torch.randn(batch, *size, generator=generator), **rows}

    return pixels


def _patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    """Return the flattened 4 x 4 patches, two frames each, of one 64 x 64 image a sample."""
    pixels = torch.randn(batch * 16 * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 16, 16]] * batch)}


def _llava() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_vision()), text_config=hf.LlamaConfig(**_text()),
        image_token_index=IMAGE, image_seq_length=64, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _llava_next() -> hf.PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_vision(image_size=32)),
        text_config=hf.MistralConfig(**_text(), sliding_window=None),
        image_token_index=IMAGE, image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]], vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _qwen2_vl() -> hf.PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "hidden_size": HIDDEN}
    text = _text(rope_parameters=dict(_QWEN_ROPE))
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS))


def _qwen2_5_vl() -> hf.PreTrainedModel:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN,
    }  # fmt: skip
    text = _text(rope_parameters=dict(_QWEN_ROPE))
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)
    )


def _gemma3() -> hf.PreTrainedModel:
    text = hf.Gemma3TextConfig(
        **_text(head_dim=16), query_pre_attn_scalar=16, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=hf.SiglipVisionConfig(**_vision(patch_size=4), vision_use_head=False),
        mm_tokens_per_image=64, boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> hf.PreTrainedModel:
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**_text(num_key_value_heads=1, head_dim=16)),
        vision_config=hf.SiglipVisionConfig(**_vision(), vision_use_head=False),
        image_token_index=IMAGE, projection_dim=HIDDEN, hidden_size=HIDDEN, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def _idefics3() -> hf.PreTrainedModel:
    vision = _vision(image_size=32, patch_size=4)
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**_text()), vision_config=vision, image_token_id=IMAGE, scale_factor=2
    )
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> hf.PreTrainedModel:
    vision = _vision(patch_size=4)
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**_text()), vision_config=vision, image_token_id=IMAGE, scale_factor=4
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _internvl() -> hf.PreTrainedModel:
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**_text()),
        vision_config=hf.InternVLVisionConfig(**_vision(image_size=[64, 64], patch_size=[4, 4])),
        image_token_id=IMAGE, image_seq_length=64, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _mistral3() -> hf.PreTrainedModel:
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**_text(head_dim=16), sliding_window=None),
        vision_config=hf.PixtralVisionConfig(**_vision(patch_size=4)),
        image_token_index=IMAGE, spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config)


def _glm4v() -> hf.PreTrainedModel:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "image_size": 64, "patch_size": 4,
        "out_hidden_size": HIDDEN,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    config = hf.Glm4vConfig(
        text_config=_text(rope_parameters=rope), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        image_start_token_id=START, image_end_token_id=END, video_start_token_id=3, video_end_token_id=4,
    )  # fmt: skip
    return hf.Glm4vForConditionalGeneration(config)


def _is_image(ids: Tensor) -> Tensor:
    return (ids == IMAGE).long()


_MARKED = ((START,), (END,))
FAMILIES = {
    "llava": Family(_llava, _images(3, 64, 64)),
    # 16 tokens of the whole image, and 6 rows of 8 patches and a newline of its tiles.
    "llava_next": Family(_llava_next, _images(5, 3, 32, 32, image_sizes=[48, 64]), image_tokens=16 + 6 * 9),
    "qwen2_vl": Family(_qwen2_vl, _patches, around=_MARKED, by_token={"mm_token_type_ids": _is_image}),
    "qwen2_5_vl": Family(_qwen2_5_vl, _patches, around=_MARKED, by_token={"mm_token_type_ids": _is_image}),
    "gemma3": Family(
        _gemma3, _images(3, 64, 64), around=_MARKED, by_token={"token_type_ids": _is_image},
        layer_types=("sliding_attention", "full_attention"),
    ),
    "paligemma": Family(_paligemma, _images(3, 64, 64), by_token={"token_type_ids": torch.zeros_like}),
    "idefics3": Family(_idefics3, _images(5, 3, 32, 32), image_tokens=5 * 16, text_model="model.text_model"),
    "smolvlm": Family(_smolvlm, _images(5, 3, 64, 64), image_tokens=5 * 16, text_model="model.text_model"),
    "internvl": Family(_internvl, _images(3, 64, 64)),
    "mistral3": Family(_mistral3, _images(3, 64, 64, image_sizes=[64, 64])),
    "glm4v": Family(_glm4v, _patches, around=_MARKED, by_token={"mm_token_type_ids": _is_image}),
}  # fmt: skip


def model(family: str) -> hf.PreTrainedModel:
    """Return the eager model in eval mode; every call gives the same weights."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        built = FAMILIES[family].build().eval()
        # Wider than Hugging Face's initialisation, so that attention is not uniform and tokens differ.
        for weight in built.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.15)
    built.generation_config.eos_token_id = None  # generate to the full length
    built.generation_config.pad_token_id = PAD
    return built


def compiled(family: str, **options: Any) -> hf.PreTrainedModel:
    """Return the model compiled in place with zipvl, by default without Inductor and for prompts of any length."""
    built = model(family)
    built.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0} | options)
    return built


def inputs(family: str, batch: int = 1, text: int = 12, pad: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Return prompts of equal length that end in `text` words; padding stands for `pad` words of the first sample."""
    kind = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    before, after = kind.around
    image = torch.tensor([BOS, *before, *[IMAGE] * kind.image_tokens, *after])
    words = torch.randint(FIRST_WORD, VOCAB, (batch, text), generator=generator)
    ids = torch.cat([image.expand(batch, -1), words], 1)
    mask = torch.ones_like(ids)
    if pad:
        ids[0] = torch.cat([torch.full((pad,), PAD), ids[0, :-pad]])
        mask[0, :pad] = 0
    by_token = {name: make(ids) for name, make in kind.by_token.items()}
    return {"input_ids": ids, "attention_mask": mask, **by_token, **kind.pixels(batch, generator)}
