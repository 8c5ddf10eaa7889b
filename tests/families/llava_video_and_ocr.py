"""Relatives of LLaVA for videos, and for reading documents: more than one tower, more than one kind of feature."""

from __future__ import annotations

import torch
import transformers as hf
from families.family import (
    HIDDEN,
    IMAGE,
    MARKED,
    OWN_LAYER,
    REWRITTEN,
    VIDEO,
    Family,
    images,
    patches,
    text_args,
    vision_args,
)
from families.llava_like import sam_args
from torch import Generator, Tensor


def _llava_next_video() -> hf.PreTrainedModel:
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**vision_args(image_size=32)), text_config=hf.LlamaConfig(**text_args()),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]],
        vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaNextVideoForConditionalGeneration(config)


def _image_and_frames(batch: int, generator: Generator) -> dict[str, Tensor]:
    frames = torch.randn(batch, 8, 3, 32, 32, generator=generator)
    return images(5, 3, 32, 32, image_sizes=[48, 64])(batch, generator) | {"pixel_values_videos": frames}


def _video_llava() -> hf.PreTrainedModel:
    config = hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision_args(image_size=32)), text_config=hf.LlamaConfig(**text_args()),
        image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.VideoLlavaForConditionalGeneration(config)


def _small_image_and_frames(batch: int, generator: Generator) -> dict[str, Tensor]:
    frames = torch.randn(batch, 4, 3, 32, 32, generator=generator)
    return images(3, 32, 32)(batch, generator) | {"pixel_values_videos": frames}


def _got_ocr2() -> hf.PreTrainedModel:
    config = hf.GotOcr2Config(
        vision_config=hf.GotOcr2VisionConfig(**sam_args(), output_channels=16),
        text_config=hf.Qwen2Config(**text_args()), image_token_index=IMAGE, image_seq_length=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.GotOcr2ForConditionalGeneration(config)


def _granite4_vision() -> hf.PreTrainedModel:
    text = hf.Granite4VisionTextConfig(
        **text_args(), embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.8, attention_multiplier=0.2
    )
    qformer = hf.Blip2QFormerConfig(
        num_hidden_layers=1, intermediate_size=64, cross_attention_frequency=1, use_qformer_text_input=False
    )
    # The first layer takes the features of windows, the second every other patch; Q-Formers have one head per 64.
    config = hf.Granite4VisionConfig(
        vision_config=hf.CLIPVisionConfig(**vision_args(hidden_size=64, image_size=32, patch_size=4)), text_config=text,
        qformer_config=qformer, image_token_index=IMAGE, image_grid_pinpoints=[[64, 64], [32, 64], [64, 32]],
        downsample_rate="1/2", deepstack_layer_map=[[1, 0]], spatial_target_layers=[1],
    )  # fmt: skip
    return hf.Granite4VisionForConditionalGeneration(config)


def _lighton_ocr() -> hf.PreTrainedModel:
    config = hf.LightOnOcrConfig(
        vision_config=hf.PixtralVisionConfig(**vision_args(patch_size=4)),
        text_config=hf.Qwen3Config(**text_args(head_dim=16)), image_token_id=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.LightOnOcrForConditionalGeneration(config)


def _fast_vlm() -> hf.PreTrainedModel:
    # Its own vision tower is a convolutional network of timm; this one gives a feature map of the same kind.
    vision = hf.ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], image_size=64, hidden_size=32)
    config = hf.FastVlmConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**text_args()), image_token_index=IMAGE, image_seq_length=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.FastVlmForConditionalGeneration(config)


def _qianfan_ocr() -> hf.PreTrainedModel:
    config = hf.QianfanOCRConfig(
        vision_config=hf.QianfanOCRVisionConfig(**vision_args(patch_size=4)),
        text_config=hf.Qwen3Config(**text_args(head_dim=16)), image_token_id=IMAGE, image_seq_length=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.QianfanOCRForConditionalGeneration(config)


_MOE = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip


def _deepseek_ocr2() -> hf.PreTrainedModel:
    encoder = hf.DeepseekOcr2VisionEncoderConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    sam = hf.DeepseekOcr2SamVisionConfig(**sam_args(image_size=64), output_channels=16, downsample_channels=[16, 32])
    config = hf.DeepseekOcr2Config(
        vision_config=hf.DeepseekOcr2VisionConfig(sam_config=sam, encoder_config=encoder),
        text_config=hf.DeepseekOcr2TextConfig(**text_args(), **_MOE), image_token_id=IMAGE,
    )  # fmt: skip
    return hf.DeepseekOcr2ForConditionalGeneration(config)


def _unlimited_ocr() -> hf.PreTrainedModel:
    sam = hf.UnlimitedOcrSamVisionConfig(**sam_args(), output_channels=16, downsample_channels=[16, 32])
    vision = hf.UnlimitedOcrVisionConfig(
        sam_config=sam, encoder_config=hf.UnlimitedOcrVisionEncoderConfig(**vision_args())
    )
    # A window over the generated tokens alone is what its checkpoints have in every layer.
    text = hf.UnlimitedOcrTextConfig(
        **text_args(), **_MOE, sliding_window=8, layer_types=["reference_sliding_attention", "full_attention"]
    )
    return hf.UnlimitedOcrForConditionalGeneration(
        hf.UnlimitedOcrConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


def _hyperclovax_vision_v2() -> hf.PreTrainedModel:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "fullatt_block_indexes": [1], "out_hidden_size": 32, "model_type": "qwen2_5_vl_vision",
    }  # fmt: skip
    config = hf.HyperCLOVAXVisionV2Config(
        vision_config=vision, text_config=hf.HyperCLOVAXConfig(**text_args(), attention_multiplier=0.2),
        image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.HyperCLOVAXVisionV2ForConditionalGeneration(config)


def _granite_docling() -> hf.PreTrainedModel:
    vision = hf.GraniteDoclingVisionConfig(
        **vision_args(patch_size=4), out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0]
    )
    text = hf.GraniteDoclingTextConfig(
        **text_args(), embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.8, attention_multiplier=0.2
    )
    config = hf.GraniteDoclingConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False
    )
    return hf.GraniteDoclingForConditionalGeneration(config)


def _tile(batch: int, generator: Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch, 1, 3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool)}


# The whole image, then 6 rows of 8 patches and a newline of its tiles, then 8 frames of 4 tokens.
_NEXT_VIDEO = {"image_tokens": 16 + 6 * 9, "around": ((), (VIDEO,) * 32)}
# The image, then 4 frames, which keep their CLS token.
_VIDEO = {"image_tokens": 16, "around": ((), (VIDEO,) * 4 * 17)}

FAMILIES = {
    "llava_next_video": Family(_llava_next_video, _image_and_frames, **_NEXT_VIDEO),
    "video_llava": Family(_video_llava, _small_image_and_frames, **_VIDEO),
    "got_ocr2": Family(_got_ocr2, images(3, 128, 128), around=MARKED),
    "granite4_vision": Family(
        _granite4_vision, images(5, 3, 32, 32, image_sizes=[48, 64]), image_tokens=16 + 6 * 9, makes_cache=False
    ),
    "lighton_ocr": Family(_lighton_ocr, images(3, 64, 64, image_sizes=[64, 64])),
    "fast_vlm": Family(_fast_vlm, images(3, 64, 64)),
    "qianfan_ocr": Family(_qianfan_ocr, images(3, 64, 64), around=MARKED),
    # As many queries as its smallest resolution has, and a separator.
    "deepseek_ocr2": Family(_deepseek_ocr2, images(3, 64, 64), image_tokens=144 + 1),
    # 8 rows of 8 patches and a newline, and a separator.
    "unlimited_ocr": Family(
        _unlimited_ocr,
        images(3, 128, 128),
        image_tokens=8 * 9 + 1,
        decoder=(OWN_LAYER, REWRITTEN),
    ),
    "hyperclovax_vision_v2": Family(_hyperclovax_vision_v2, patches, around=MARKED),
    "granite_docling": Family(_granite_docling, _tile, text_model="model.text_model"),
}  # fmt: skip
