"""Qwen-VL and what took over its vision: pixels as flat patches of any grid, M-RoPE."""

from __future__ import annotations

import torch
import transformers as hf
from families.family import (
    END,
    HIDDEN,
    IMAGE,
    MARKED,
    OWN_LAYER,
    REWRITTEN,
    START,
    VIDEO,
    Family,
    is_image,
    patches,
    text_args,
    vision_args,
)
from torch import Generator, Tensor

_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_ROPE: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# One linear layer and one full one.
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 16,
    "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "mrope_interleaved": True},
}  # fmt: skip


def _qwen2_vl() -> hf.PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "hidden_size": HIDDEN}
    text = text_args(rope_parameters=dict(_ROPE))
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS))


def _qwen2_5_vl() -> hf.PreTrainedModel:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN,
    }  # fmt: skip
    text = text_args(rope_parameters=dict(_ROPE))
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)
    )


def _qwen3_vision(**changes: object) -> dict[str, object]:
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": HIDDEN, "num_position_embeddings": 64,
    } | changes  # fmt: skip


def _qwen3_vl() -> hf.PreTrainedModel:
    text = text_args(head_dim=16, rope_parameters=_ROPE | {"mrope_interleaved": True})
    vision = _qwen3_vision(deepstack_visual_indexes=[0, 1])
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS))


def _qwen3_vl_moe() -> hf.PreTrainedModel:
    text = text_args(head_dim=16, rope_parameters=_ROPE | {"mrope_interleaved": True}, **_MOE)
    vision = _qwen3_vision(deepstack_visual_indexes=[0, 1])
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_QWEN_IDS)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


def _qwen3_5() -> hf.PreTrainedModel:
    config = hf.Qwen3_5Config(text_config=text_args(**_LINEAR), vision_config=_qwen3_vision(), **_QWEN_IDS)
    return hf.Qwen3_5ForConditionalGeneration(config)


def _qwen3_5_moe() -> hf.PreTrainedModel:
    text = text_args(**_LINEAR, **_MOE, shared_expert_intermediate_size=32)
    config = hf.Qwen3_5MoeConfig(text_config=text, vision_config=_qwen3_vision(), **_QWEN_IDS)
    return hf.Qwen3_5MoeForConditionalGeneration(config)


def _patches_apart(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch * 16 * 16, 3, 4, 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 16, 16]] * batch)}


def _paddleocr_vl() -> hf.PreTrainedModel:
    config = hf.PaddleOCRVLConfig(
        text_config=text_args(head_dim=16, rope_parameters=dict(_ROPE)),
        vision_config=vision_args(patch_size=4), tie_word_embeddings=False, **_QWEN_IDS,
    )  # fmt: skip
    return hf.PaddleOCRVLForConditionalGeneration(config)


def _patches_to_merge(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch * 16 * 16, 3 * 4 * 4, generator=generator)
    grid = torch.tensor([[1, 16, 16]] * batch)
    return {"pixel_values": pixels, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([2] * batch)}


def _video_llama_3() -> hf.PreTrainedModel:
    vision = vision_args(patch_size=4)
    vision.pop("image_size")
    config = hf.VideoLlama3Config(
        text_config=text_args(model_type="qwen2"), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip
    return hf.VideoLlama3ForConditionalGeneration(config)


def _exaone4_5() -> hf.PreTrainedModel:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN, "num_key_value_heads": 1,
    }  # fmt: skip
    text = text_args(
        model_type="exaone4", sliding_window=32, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = hf.Exaone4_5_Config(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)
    return hf.Exaone4_5_ForConditionalGeneration(config)


def _patches_in_a_row(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(1, 3, 4, batch * 32 * 32 * 4, generator=generator)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[32, 32]] * batch)}


def _minicpmv4_6() -> hf.PreTrainedModel:
    config = hf.MiniCPMV4_6Config(
        text_config=text_args(model_type="qwen3_5_text", **_LINEAR), vision_config=vision_args(patch_size=4),
        insert_layer_id=0, image_size=64, image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip
    return hf.MiniCPMV4_6ForConditionalGeneration(config)


_EARS = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": HIDDEN}


def _qwen2_5_omni_thinker() -> hf.PreTrainedModel:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN,
    }  # fmt: skip
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config=text_args(rope_parameters=dict(_ROPE)), vision_config=vision, audio_config=dict(_EARS),
        image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=9, audio_start_token_id=3,
        audio_end_token_id=4, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen3_omni_moe_thinker() -> hf.PreTrainedModel:
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config=text_args(head_dim=16, rope_parameters=_ROPE | {"mrope_interleaved": True}, **_MOE),
        vision_config=_qwen3_vision(deepstack_visual_indexes=[0, 1]),
        audio_config=_EARS | {"downsample_hidden_size": 16},
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=9, audio_start_token_id=3,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _qwen4_exp() -> hf.PreTrainedModel:
    text = text_args(
        **_LINEAR | {"layer_types": ["linear_attention", "indexed_attention"]}, **_MOE,
        shared_expert_intermediate_size=32, hc_count=2, hc_lowrank=16, indexer_n_heads=2, indexer_kv_heads=1,
        indexer_head_dim=16, indexer_budget=32, indexer_compress_ratio=4,
    )  # fmt: skip
    config = hf.Qwen4ExpConfig(text_config=text, vision_config=_qwen3_vision(), **_QWEN_IDS)
    return hf.Qwen4ExpForConditionalGeneration(config)


_TYPED = {"around": MARKED, "by_token": {"mm_token_type_ids": is_image}}
FAMILIES = {
    "qwen2_vl": Family(_qwen2_vl, patches, **_TYPED),
    "qwen2_5_vl": Family(_qwen2_5_vl, patches, **_TYPED),
    "qwen3_vl": Family(_qwen3_vl, patches, **_TYPED),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, patches, **_TYPED),
    "qwen3_5": Family(_qwen3_5, patches, **_TYPED, decoder=(REWRITTEN,)),
    "qwen3_5_moe": Family(_qwen3_5_moe, patches, **_TYPED, decoder=(REWRITTEN,)),
    "paddleocr_vl": Family(_paddleocr_vl, _patches_apart, **_TYPED),
    "video_llama_3": Family(_video_llama_3, _patches_to_merge),
    "exaone4_5": Family(_exaone4_5, patches, decoder=("sliding window", REWRITTEN)),
    "minicpmv4_6": Family(_minicpmv4_6, _patches_in_a_row, decoder=(REWRITTEN,)),
    "qwen2_5_omni_thinker": Family(_qwen2_5_omni_thinker, patches, around=MARKED),
    "qwen3_omni_moe_thinker": Family(_qwen3_omni_moe_thinker, patches, around=MARKED),
    "qwen4_exp": Family(_qwen4_exp, patches, **_TYPED, decoder=(OWN_LAYER,)),
}
