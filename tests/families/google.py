"""Gemma and PaliGemma: sliding layers, image spans that attend both ways, prefix masks, shared KV."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families.family import (
    END,
    HIDDEN,
    IMAGE,
    MARKED,
    REWRITTEN,
    START,
    VIDEO,
    VOCAB,
    Family,
    images,
    is_image,
    text_args,
    vision_args,
)
from torch import Generator, Tensor, nn
from transformers.modeling_outputs import BaseModelOutput


def _gemma3() -> hf.PreTrainedModel:
    text = hf.Gemma3TextConfig(
        **text_args(head_dim=16), query_pre_attn_scalar=16, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=hf.SiglipVisionConfig(**vision_args(patch_size=4), vision_use_head=False),
        mm_tokens_per_image=64, boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> hf.PreTrainedModel:
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**text_args(num_key_value_heads=1, head_dim=16)),
        vision_config=hf.SiglipVisionConfig(**vision_args(), vision_use_head=False),
        image_token_index=IMAGE, projection_dim=HIDDEN, hidden_size=HIDDEN, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


class _Gemma3nTowerConfig(hf.Gemma3nVisionConfig):
    model_type = "gemma3n_tower"


class _Gemma3nTower(hf.PreTrainedModel):
    """Stands for the convolutional network of timm, which the tests do not need: pixels to `[batch, hidden, 8, 8]`."""

    config_class = _Gemma3nTowerConfig

    def __init__(self, config: _Gemma3nTowerConfig):
        super().__init__(config)
        self.conv = nn.Conv2d(3, config.hidden_size, kernel_size=8, stride=8)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.conv(pixel_values))


hf.AutoModel.register(_Gemma3nTowerConfig, _Gemma3nTower)


def _gemma3n() -> hf.PreTrainedModel:
    text = hf.Gemma3nTextConfig(
        **text_args(num_hidden_layers=4, head_dim=16), layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=32, num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        laurel_rank=8, altup_num_inputs=2,
    )  # fmt: skip
    audio = {
        "vocab_size": 4, "vocab_offset": VOCAB + 4, "hidden_size": 32, "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2, "sscp_conv_channel_size": [8, 4],
    }  # fmt: skip
    config = hf.Gemma3nConfig(
        text_config=text, vision_config=_Gemma3nTowerConfig(hidden_size=32, vocab_size=4, vocab_offset=VOCAB),
        audio_config=audio, vision_soft_tokens_per_image=64, image_token_id=IMAGE, audio_token_id=VIDEO,
        boi_token_id=START, eoi_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma3nForConditionalGeneration(config)


def _gemma4(**changes: Any) -> hf.PreTrainedModel:
    text = hf.Gemma4TextConfig(
        **text_args(num_hidden_layers=len(changes.get("layer_types", "22")), head_dim=16), sliding_window=32,
        global_head_dim=32, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        **{"layer_types": ["sliding_attention", "full_attention"]} | changes,
    )  # fmt: skip
    vision = hf.Gemma4VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, patch_size=4, pooling_kernel_size=2, position_embedding_size=32,
    )  # fmt: skip
    config = hf.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO,
        boi_token_id=START, eoi_token_id=END, audio_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma4ForConditionalGeneration(config)


def _gemma4_shared() -> hf.PreTrainedModel:
    return _gemma4(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)


def _gemma4_moe() -> hf.PreTrainedModel:
    return _gemma4(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32, attention_k_eq_v=True,
        num_global_key_value_heads=1, use_bidirectional_attention="vision",
    )  # fmt: skip


def positioned_patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    column, row = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="xy")
    positions = torch.stack([column, row], -1).reshape(1, 256, 2).repeat(batch, 1, 1)
    return {"pixel_values": torch.rand(batch, 256, 3 * 4 * 4, generator=generator), "image_position_ids": positions}


def _gemma4_unified() -> hf.PreTrainedModel:
    text = hf.Gemma4UnifiedTextConfig(
        **text_args(head_dim=16), sliding_window=32, global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = {
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 32,
        "mm_posemb_size": 8,
        "output_proj_dims": 32,
    }
    config = hf.Gemma4UnifiedConfig(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO,
        boi_token_id=START, eoi_token_id=END, audio_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma4UnifiedForConditionalGeneration(config)


def _shieldgemma2() -> hf.PreTrainedModel:
    gemma3 = _gemma3().config
    config = hf.ShieldGemma2Config(
        text_config=gemma3.text_config, vision_config=gemma3.vision_config, mm_tokens_per_image=64,
        boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE, yes_token_index=10, no_token_index=11,
    )  # fmt: skip
    return hf.ShieldGemma2ForImageClassification(config)


def _merged_patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    column, row = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy")
    positions = torch.stack([column, row], -1).reshape(1, 64, 2).repeat(batch, 1, 1)
    return {"pixel_values": torch.rand(batch, 64, 3 * 8 * 8, generator=generator), "image_position_ids": positions}


FAMILIES = {
    "gemma3": Family(
        _gemma3, images(3, 64, 64), around=MARKED, by_token={"token_type_ids": is_image},
        decoder=("sliding window", REWRITTEN),
    ),
    "paligemma": Family(_paligemma, images(3, 64, 64), by_token={"token_type_ids": torch.zeros_like}),
    "gemma3n": Family(
        _gemma3n, images(3, 64, 64), around=MARKED, decoder=("sliding window", REWRITTEN, "sliding window", REWRITTEN)
    ),
    "gemma4": Family(
        _gemma4, positioned_patches, around=MARKED, by_token={"mm_token_type_ids": is_image},
        decoder=("sliding window", REWRITTEN),
    ),
    "gemma4_shared": Family(
        _gemma4_shared, positioned_patches, around=MARKED, by_token={"mm_token_type_ids": is_image},
        decoder=("sliding window", REWRITTEN, "sliding window", REWRITTEN),
    ),
    "gemma4_moe": Family(
        _gemma4_moe, positioned_patches, around=MARKED, by_token={"mm_token_type_ids": is_image},
        decoder=("sliding window", REWRITTEN),
    ),
    "gemma4_unified": Family(
        _gemma4_unified, _merged_patches, around=MARKED, by_token={"mm_token_type_ids": is_image},
        decoder=("sliding window", REWRITTEN),
    ),
    # A classifier: it has no `generate`.
    "shieldgemma2": Family(
        _shieldgemma2, images(3, 64, 64), around=MARKED, by_token={"token_type_ids": is_image},
        decoder=("sliding window", REWRITTEN), text_model="model.model.language_model", generates=False,
    ),
}  # fmt: skip
