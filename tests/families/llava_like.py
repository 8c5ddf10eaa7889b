"""LLaVA and what followed its recipe: a vision tower, a projector, image tokens in a causal decoder."""

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
    text_args,
    vision_args,
)
from torch import Generator, Tensor


def sam_args(**changes: int) -> dict[str, Any]:
    """Return the arguments of a vision tower of SAM's kind: a windowed layer and a global one."""
    return {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128, "patch_size": 4,
        "mlp_dim": 64, "window_size": 8, "global_attn_indexes": [1],
    } | changes  # fmt: skip


def _llava() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision_args()), text_config=hf.LlamaConfig(**text_args()),
        image_token_index=IMAGE, image_seq_length=64, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _llava_next() -> hf.PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**vision_args(image_size=32)),
        text_config=hf.MistralConfig(**text_args(), sliding_window=None),
        image_token_index=IMAGE, image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]], vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _internvl() -> hf.PreTrainedModel:
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**text_args()),
        vision_config=hf.InternVLVisionConfig(**vision_args(image_size=[64, 64], patch_size=[4, 4])),
        image_token_id=IMAGE, image_seq_length=64, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _mistral3() -> hf.PreTrainedModel:
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**text_args(head_dim=16), sliding_window=None),
        vision_config=hf.PixtralVisionConfig(**vision_args(patch_size=4)),
        image_token_index=IMAGE, spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config)


def _llava_onevision() -> hf.PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision_args(image_size=32), vision_use_head=False),
        text_config=hf.Qwen2Config(**text_args()), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]],
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _vipllava() -> hf.PreTrainedModel:
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision_args()), text_config=hf.LlamaConfig(**text_args()),
        image_token_index=IMAGE, image_seq_length=64, vision_feature_layer=(-1, 1),
    )  # fmt: skip
    return hf.VipLlavaForConditionalGeneration(config)


def _cohere2_text() -> hf.Cohere2Config:
    return hf.Cohere2Config(**text_args(), sliding_window=32, layer_types=["sliding_attention", "full_attention"])


def _aya_vision() -> hf.PreTrainedModel:
    vision = hf.SiglipVisionConfig(**vision_args(patch_size=4), vision_use_head=False)
    config = hf.AyaVisionConfig(
        vision_config=vision, text_config=_cohere2_text(), image_token_index=IMAGE, tie_word_embeddings=False
    )
    return hf.AyaVisionForConditionalGeneration(config)


def _cohere2_vision() -> hf.PreTrainedModel:
    vision = hf.SiglipVisionConfig(**vision_args(patch_size=4), vision_use_head=False)
    config = hf.Cohere2VisionConfig(
        vision_config=vision, text_config=_cohere2_text(), image_token_id=IMAGE, alignment_intermediate_size=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Cohere2VisionForConditionalGeneration(config)


def _pixtral() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**vision_args()),
        text_config=hf.MistralConfig(**text_args(head_dim=16), sliding_window=None),
        image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _janus() -> hf.PreTrainedModel:
    vision = hf.JanusVisionConfig(
        **vision_args(), mlp_ratio=2.0, projection_dim=HIDDEN, num_image_tokens=64, use_qk_norm=False
    )
    # The VQ-VAE generates images; text generation does not run it.
    vq = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": (1,),
          "num_res_blocks": 1, "projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN}  # fmt: skip
    config = hf.JanusConfig(
        vision_config=vision, vq_config=vq, text_config=hf.LlamaConfig(**text_args()), image_token_id=IMAGE,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.JanusForConditionalGeneration(config)


def _deepseek_vl() -> hf.PreTrainedModel:
    config = hf.DeepseekVLConfig(
        vision_config=hf.SiglipVisionConfig(**vision_args(), vision_use_head=False),
        text_config=hf.LlamaConfig(**text_args()), image_token_id=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.DeepseekVLForConditionalGeneration(config)


def _deepseek_vl_hybrid() -> hf.PreTrainedModel:
    high = hf.SamVisionConfig(**sam_args(image_size=64), output_channels=16)
    config = hf.DeepseekVLHybridConfig(
        vision_config=hf.SiglipVisionConfig(**vision_args(), vision_use_head=False), high_res_vision_config=high,
        text_config=hf.LlamaConfig(**text_args()), image_token_id=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.DeepseekVLHybridForConditionalGeneration(config)


def _two_resolutions(batch: int, generator: Generator) -> dict[str, Tensor]:
    low, high = (torch.randn(batch, 3, 64, 64, generator=generator) for _ in range(2))
    return {"pixel_values": low, "high_res_pixel_values": high}


def _ovis2() -> hf.PreTrainedModel:
    vision = hf.Ovis2VisionConfig(**vision_args(patch_size=4), hidden_stride=2, vocab_size=32)
    config = hf.Ovis2Config(
        vision_config=vision, text_config=hf.Qwen2Config(**text_args()), image_token_id=IMAGE, vocab_size=VOCAB,
        visual_indicator_token_ids=(START, END, 3, 4, 9), hidden_size=HIDDEN, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Ovis2ForConditionalGeneration(config)


def _perception_lm() -> hf.PreTrainedModel:
    # Its own vision tower is a transformer of timm; this one gives as many features, a CLS token among them.
    vision = hf.CLIPVisionConfig(**vision_args(patch_size=4), model_args={"embed_dim": 32})
    config = hf.PerceptionLMConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**text_args()), image_token_id=IMAGE, video_token_id=VIDEO,
        projector_pooling_ratio=2, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.PerceptionLMForConditionalGeneration(config)


def _aria() -> hf.PreTrainedModel:
    text = hf.AriaTextConfig(**text_args(intermediate_size=32), moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2)
    config = hf.AriaConfig(
        vision_config=hf.Idefics3VisionConfig(**vision_args()), text_config=text, image_token_index=IMAGE,
        projector_patch_to_query_dict={64: 64},
    )  # fmt: skip
    return hf.AriaForConditionalGeneration(config)


def _llama4() -> hf.PreTrainedModel:
    vision = hf.Llama4VisionConfig(
        **vision_args(patch_size=4, intermediate_size=128), vision_output_dim=HIDDEN, projector_input_dim=HIDDEN,
        projector_output_dim=HIDDEN,
    )  # fmt: skip
    # A chunked layer with rotary embeddings, and a full one without them that scales its queries by position.
    text = hf.Llama4TextConfig(
        **text_args(head_dim=16), intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=2,
        interleave_moe_layer_step=2, no_rope_layers=[1, 0], attention_chunk_size=32, floor_scale=32,
    )  # fmt: skip
    config = hf.Llama4Config(
        vision_config=vision, text_config=text, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )
    return hf.Llama4ForConditionalGeneration(config)


def _lfm2_vl() -> hf.PreTrainedModel:
    text = hf.Lfm2Config(**text_args(num_hidden_layers=3), layer_types=["conv", "full_attention", "full_attention"])
    vision = hf.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=4,
        num_patches=256, vision_use_head=False,
    )  # fmt: skip
    config = hf.Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Lfm2VlForConditionalGeneration(config)


def _masked_patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(batch, 256, 3 * 4 * 4, generator=generator),
        "pixel_attention_mask": torch.ones(batch, 256, dtype=torch.long),
        "spatial_shapes": torch.tensor([[16, 16]] * batch),
    }


FAMILIES = {
    "llava": Family(_llava, images(3, 64, 64)),
    # 16 tokens of the whole image, and 6 rows of 8 patches and a newline of its tiles.
    "llava_next": Family(_llava_next, images(5, 3, 32, 32, image_sizes=[48, 64]), image_tokens=16 + 6 * 9),
    "internvl": Family(_internvl, images(3, 64, 64)),
    "mistral3": Family(_mistral3, images(3, 64, 64, image_sizes=[64, 64])),
    # 16 tokens of the whole image, and 6 rows of 8 patches and a newline of its tiles.
    "llava_onevision": Family(_llava_onevision, images(5, 3, 32, 32, image_sizes=[48, 64]), image_tokens=16 + 6 * 9),
    "vipllava": Family(_vipllava, images(3, 64, 64)),
    "aya_vision": Family(_aya_vision, images(3, 64, 64), decoder=("sliding window", REWRITTEN)),
    "cohere2_vision": Family(_cohere2_vision, images(3, 64, 64), decoder=("sliding window", REWRITTEN)),
    "pixtral": Family(_pixtral, images(3, 64, 64, image_sizes=[64, 64])),
    "janus": Family(_janus, images(3, 64, 64)),
    "deepseek_vl": Family(_deepseek_vl, images(3, 64, 64)),
    "deepseek_vl_hybrid": Family(_deepseek_vl_hybrid, _two_resolutions),
    "ovis2": Family(_ovis2, images(3, 64, 64), around=MARKED),
    "perception_lm": Family(_perception_lm, images(1, 3, 64, 64)),
    "aria": Family(_aria, images(3, 64, 64)),
    "llama4": Family(
        _llama4, images(3, 64, 64), around=MARKED, decoder=("sliding window or chunks", REWRITTEN),
        text_model="language_model.model", broken_in="5.24",  # AttributeError: image_outputs
    ),
    "lfm2_vl": Family(_lfm2_vl, _masked_patches),
}  # fmt: skip
