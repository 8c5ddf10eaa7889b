"""GLM-V, and families of 2025 and 2026 with patches of any grid: MLA, indexers, sliding and linear layers."""

from __future__ import annotations

import torch
import transformers as hf
from families.family import (
    END,
    HIDDEN,
    IMAGE,
    MARKED,
    OTHER_CACHE,
    OTHER_LAYER,
    OWN_LAYER,
    REWRITTEN,
    START,
    VIDEO,
    VOCAB,
    Family,
    images,
    is_image,
    patches,
    text_args,
    vision_args,
)
from torch import Generator, Tensor

_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END,
    "video_start_token_id": 3, "video_end_token_id": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_MOE = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def _vision() -> dict[str, object]:
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "image_size": 64, "patch_size": 4,
        "out_hidden_size": HIDDEN,
    }  # fmt: skip


def _glm4v() -> hf.PreTrainedModel:
    text = text_args(rope_parameters=dict(_ROPE))
    return hf.Glm4vForConditionalGeneration(hf.Glm4vConfig(text_config=text, vision_config=_vision(), **_IDS))


def _glm46v() -> hf.PreTrainedModel:
    config = hf.Glm46VConfig(
        text_config=text_args(model_type="glm4v_text", rope_parameters=dict(_ROPE)),
        vision_config=_vision() | {"model_type": "glm4v_vision"}, **_IDS,
    )  # fmt: skip
    return hf.Glm46VForConditionalGeneration(config)


def _glm4v_moe() -> hf.PreTrainedModel:
    text = text_args(**_MOE, first_k_dense_replace=1, rope_parameters=dict(_ROPE))
    config = hf.Glm4vMoeConfig(text_config=text, vision_config=_vision(), **_IDS)
    return hf.Glm4vMoeForConditionalGeneration(config)


def _glm_ocr() -> hf.PreTrainedModel:
    text = text_args(rope_parameters=_ROPE | {"partial_rotary_factor": 1.0, "mrope_section": [2, 3, 3]})
    return hf.GlmOcrForConditionalGeneration(hf.GlmOcrConfig(text_config=text, vision_config=_vision(), **_IDS))


def _patches_apart(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch * 16 * 16, 3, 4, 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 16, 16]] * batch)}


def _flat_patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch * 16 * 16, 3 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 16, 16]] * batch)}


def _kimi_k25() -> hf.PreTrainedModel:
    text = text_args(model_type="deepseek_v3", num_key_value_heads=4, first_k_dense_replace=1, **_MLA, **_MOE)
    vision = vision_args(patch_size=4, pos_emb_height=16, pos_emb_width=16)
    vision.pop("image_size")
    config = hf.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=32, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Kimi_K25ForConditionalGeneration(config)


def _minimax_m3_vl() -> hf.PreTrainedModel:
    text = text_args(
        head_dim=16, rotary_dim=8, num_local_experts=4, num_experts_per_tok=2, dense_intermediate_size=64,
        shared_intermediate_size=32, intermediate_size=32, mlp_layer_types=["dense", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2, index_head_dim=16, index_block_size=16, index_topk_blocks=3,
    )  # fmt: skip
    config = hf.MiniMaxM3VLConfig(
        text_config=text, vision_config=vision_args(patch_size=4, hidden_size=48), image_token_index=IMAGE,
        video_token_index=VIDEO, projector_hidden_size=32,
    )  # fmt: skip
    return hf.MiniMaxM3SparseForConditionalGeneration(config)


def _crops(batch: int, generator: Generator) -> dict[str, Tensor]:
    cells = torch.arange(batch * 16 * 16).reshape(batch, 8, 2, 8, 2).transpose(2, 3).reshape(-1, 4)
    pixels = torch.randn(batch, 16 * 16, 3 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_token_pooling": cells, "image_grids": torch.tensor([[8, 8, 0, 0]] * batch)}


def _molmo2() -> hf.PreTrainedModel:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = hf.Molmo2Config(
        text_config=text_args(head_dim=16, additional_vocab_size=8),
        vision_config=vision_args(image_size=[64, 64], patch_size=4, **heads),
        adapter_config={
            "hidden_size": 32, "intermediate_size": 64, "text_hidden_size": HIDDEN, "vision_feature_layer": [1, 0],
            **heads,
        },
        image_patch_id=IMAGE, image_start_token_id=START, image_end_token_id=END,
    )  # fmt: skip
    return hf.Molmo2ForConditionalGeneration(config)


def _ernie4_5_vl_moe() -> hf.PreTrainedModel:
    text = text_args(
        moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_intermediate_size=[32, 16],
        mlp_layer_types=["dense", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    )  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    config = hf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_IDS)
    return hf.Ernie4_5_VLMoeForConditionalGeneration(config)


def _hunyuan_vl() -> hf.PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    vision = vision_args(patch_size=4, max_image_size=64, min_image_size=8, out_hidden_size=HIDDEN)
    vision.pop("image_size")
    config = hf.HunYuanVLConfig(
        text_config=text_args(head_dim=16, rope_parameters=rope), vision_config=vision, image_token_id=IMAGE,
        im_start_id=START, im_end_id=END, im_newline_id=9, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.HunYuanVLForConditionalGeneration(config)


def _lfm3_vl() -> hf.PreTrainedModel:
    text = text_args(
        model_type="lfm3", num_hidden_layers=3, head_dim=16, sliding_window=32, conv_L_cache=3,
        layer_types=["conv", "sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "patch_size": 4, "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    config = hf.Lfm3VlConfig(
        text_config=text, vision_config=vision, projector_hidden_size=32, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Lfm3VlForConditionalGeneration(config)


def _step3p7() -> hf.PreTrainedModel:
    text = text_args(
        head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=32,
        mlp_layer_types=["dense", "sparse"], n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, share_expert_dim=32, num_sliding_attention_heads=6,
    )  # fmt: skip
    config = hf.Step3p7Config(
        text_config=text, vision_config=vision_args(patch_size=2, max_position_embeddings=1024, mlp_ratio=2.0),
        image_token_id=IMAGE,
    )  # fmt: skip
    return hf.Step3p7ForConditionalGeneration(config)


def _mistral4() -> hf.PreTrainedModel:
    config = hf.Mistral3Config(
        text_config=text_args(model_type="mistral4", num_key_value_heads=4, **_MLA, **_MOE),
        vision_config=hf.PixtralVisionConfig(**vision_args(patch_size=4)),
        image_token_index=IMAGE, spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config)


_INDEX = {"index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}


def _mistral_large4() -> hf.PreTrainedModel:
    # The last two layers read the cache of the first two, one with rotation and one without.
    text = text_args(
        num_hidden_layers=4, num_key_value_heads=4, no_rope_layers=[1, 0, 1, 0], kv_source_layers=[0, 1, 0, 1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **_MLA, **_MOE, **_INDEX,
    )  # fmt: skip
    text.pop("q_lora_rank")
    config = hf.MistralLarge4Config(
        text_config=text, vision_config=hf.PixtralVisionConfig(**vision_args(patch_size=4)),
        image_token_index=IMAGE, spatial_merge_size=2,
    )  # fmt: skip
    return hf.MistralLarge4ForConditionalGeneration(config)


def _glm5_next() -> hf.PreTrainedModel:
    text = text_args(
        num_key_value_heads=4, layer_types=["linear_attention", "indexed_attention"], index_kpool=4,
        mlp_layer_types=["dense", "sparse"], hc_mult=2, linear_head_dim=16, linear_num_heads=4,
        **_MLA | {"qk_rope_head_dim": 0}, **_MOE, **_INDEX,
    )  # fmt: skip
    vision = _vision() | {"projection_intermediate_size": 64}
    config = hf.Glm5NextConfig(text_config=text, vision_config=vision, **_IDS)
    return hf.Glm5NextForConditionalGeneration(config)


def _dots3_note() -> hf.PreTrainedModel:
    text = text_args(
        num_key_value_heads=4, sliding_window=32, layer_types=["sliding_attention", "indexed_attention"],
        mlp_layer_types=["dense", "sparse"], shared_experts_intermediate_size=32, **_MLA, **_MOE, **_INDEX,
    )  # fmt: skip
    vision = vision_args(
        patch_size=4, moe_intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, adapter_in_dim=32,
        adapter_out_dim=HIDDEN, mlp_layer_types=["dense", "sparse"], router_scaling_factor=1.0,
    )  # fmt: skip
    vision.pop("image_size")
    audio = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "downsample_hidden_size": 16, "adapter_input_size": 32, "adapter_out_dim": HIDDEN,
    }  # fmt: skip
    config = hf.Dots3NoteConfig(
        text_config=text, vision_config=vision, audio_config=audio, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=9,
    )  # fmt: skip
    return hf.Dots3NoteForConditionalGeneration(config)


def _muse_spark() -> hf.PreTrainedModel:
    text = text_args(
        head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
        moe_intermediate_size=32, moe_hidden_size=32, num_local_experts=4, num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    vision = vision_args(patch_size=4, pos_emb_height=16, pos_emb_width=16, max_position_embeddings=256)
    vision.pop("image_size")
    audio = {
        "patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2,
        "out_hidden_size": HIDDEN,
    }  # fmt: skip
    config = hf.MuseSparkConfig(
        text_config=text, vision_config=vision, audio_config=audio, out_hidden_size=128, projector_hidden_size=32,
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=9,
    )  # fmt: skip
    return hf.MuseSparkForConditionalGeneration(config)


def _merged_patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch * 8 * 8, 8, 8, 3, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]] * batch)}


def _inkling2() -> hf.PreTrainedModel:
    text = text_args(
        head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, sliding_window_size=32,
        layer_types=["hybrid_sliding", "hybrid"], d_rel=4, rel_extent=32, moe_intermediate_size=32,
        n_routed_experts=4, num_experts_per_tok=2, n_layers_per_attn_res_block=1, unpadded_vocab_size=VOCAB,
    )  # fmt: skip
    vision = vision_args(
        patch_size=4, posemb_grid_size=16, projection_hidden_dim=32, text_hidden_size=HIDDEN
    )  # fmt: skip
    vision.pop("image_size")
    for name in ("intermediate_size", "tie_word_embeddings"):
        text.pop(name)
    config = hf.Inkling2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return hf.Inkling2ForConditionalGeneration(config)


def _patches_and_grid(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch * 16 * 16, 3 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_hw": torch.tensor([[16, 16]] * batch)}


def _nemotron_h_omni() -> hf.PreTrainedModel:
    text = text_args(
        model_type="nemotron_h", head_dim=16, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4, ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, chunk_size=16,
        moe_shared_expert_intermediate_size=32, **_MOE,
    )  # fmt: skip
    audio = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "subsampling_conv_channels": 16, "projection_hidden_size": 32, "projection_bias": False,
    }  # fmt: skip
    vision = vision_args(
        video_temporal_patch_size=2, max_img_size=128, patch_size=4, mlp_ratio=2.0, num_registers=1, num_cls_tokens=1,
    )  # fmt: skip
    vision.pop("intermediate_size")
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text, vision_config=vision, audio_config=audio, vision_hidden_size=32, projector_hidden_size=32,
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=9,
    )  # fmt: skip
    return hf.NemotronH_Omni_Reasoning_V3(config)


_TYPED = {"around": MARKED, "by_token": {"mm_token_type_ids": is_image}}
FAMILIES = {
    "glm4v": Family(_glm4v, patches, **_TYPED),
    "glm4v_moe": Family(_glm4v_moe, patches, **_TYPED),
    "glm46v": Family(_glm46v, patches, **_TYPED),
    "glm_ocr": Family(_glm_ocr, patches, **_TYPED),
    "kimi_k25": Family(_kimi_k25, _patches_apart),
    "minimax_m3_vl": Family(_minimax_m3_vl, patches, around=MARKED, decoder=(REWRITTEN, OWN_LAYER)),
    "molmo2": Family(_molmo2, _crops, **_TYPED),
    "ernie4_5_vl_moe": Family(_ernie4_5_vl_moe, _flat_patches, **_TYPED),
    # 8 rows of 8 patches and a newline, between a beginning and an end.
    "hunyuan_vl": Family(_hunyuan_vl, _flat_patches, image_tokens=8 * 9 + 2, by_token={"mm_token_type_ids": is_image}),
    "lfm3_vl": Family(_lfm3_vl, patches, around=MARKED, decoder=("sliding window", REWRITTEN)),
    "step3p7": Family(_step3p7, images(3, 64, 64), decoder=("sliding window", REWRITTEN)),
    "mistral4": Family(_mistral4, images(3, 64, 64, image_sizes=[64, 64])),
    "mistral_large4": Family(
        _mistral_large4, images(3, 64, 64, image_sizes=[64, 64]),
        decoder=(OTHER_CACHE,) * 2 + (OTHER_LAYER,) * 2,
    ),
    "glm5_next": Family(_glm5_next, patches, around=MARKED, decoder=("its keys come from outside of this graph",)),
    "dots3_note": Family(_dots3_note, _flat_patches, decoder=(OTHER_CACHE,) * 2),
    "muse_spark": Family(_muse_spark, patches, decoder=("sliding window", REWRITTEN)),
    "nemotron_h_omni": Family(
        _nemotron_h_omni, _patches_and_grid, decoder=(REWRITTEN,), text_model="language_model.model"
    ),
    "inkling2": Family(_inkling2, _merged_patches, decoder=(OTHER_CACHE,) * 2),
}  # fmt: skip
