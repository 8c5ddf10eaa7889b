"""Models around a decoder of another kind: Q-Formers, image prefixes, encoder-decoders, discrete image tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families.family import (
    BOS,
    END,
    EOS,
    FIRST_WORD,
    HIDDEN,
    IMAGE,
    MARKED,
    OWN_LAYER,
    PAD,
    REWRITTEN,
    START,
    VOCAB,
    Family,
    images,
    is_image,
    text_args,
    vision_args,
)
from families.google import positioned_patches
from families.idefics_like import long_text, open_gates
from torch import Generator, Tensor


def _phi4_multimodal() -> hf.PreTrainedModel:
    audio = {
        "hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8, "audio_token_id": 3,
    }  # fmt: skip
    config = hf.Phi4MultimodalConfig(
        **text_args(), audio_config=audio,
        vision_config=vision_args(image_size=32, patch_size=4, crop_size=32, image_token_id=IMAGE),
    )  # fmt: skip
    return hf.Phi4MultimodalForCausalLM(config)


def _tiles(batch: int, generator: Generator) -> dict[str, Tensor]:
    seen = torch.ones(batch, 5, 8, 8)
    # Without padding the eager vision tower gets no mask and attends causally, the compiled one gets a mask of ones.
    seen[:, [2, 4], :, 6:] = 0
    return {
        "image_pixel_values": torch.randn(batch, 5, 3, 32, 32, generator=generator),
        "image_sizes": torch.tensor([[64, 64]] * batch),
        "image_attention_mask": seen,
    }


def _fuyu() -> hf.PreTrainedModel:
    text = hf.PersimmonConfig(**text_args(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    config = hf.FuyuConfig(text_config=text, image_size=64, patch_size=8, image_token_id=IMAGE)
    return hf.FuyuForCausalLM(config)


def _chameleon() -> hf.PreTrainedModel:
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = {f"IMGIMG{str(i).translate(letters)}Z": VOCAB - 32 + i for i in range(32)}
    vision = {
        "embed_dim": 16, "num_embeddings": 32, "latent_channels": 16, "resolution": 32, "base_channels": 32,
        "channel_multiplier": [1, 1, 1], "num_res_blocks": 1,
    }  # fmt: skip
    config = hf.ChameleonConfig(**text_args(), vq_config=vision, vocabulary_map={"<image>": IMAGE} | codes)
    return hf.ChameleonForConditionalGeneration(config)


def _emu3() -> hf.PreTrainedModel:
    codes = {f"<|visual token {i:06d}|>": VOCAB - 32 + i for i in range(32)}
    vision = {
        "codebook_size": 32, "base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1,
        "hidden_size": 32, "temporal_downsample_factor": 2,
    }  # fmt: skip
    config = hf.Emu3Config(
        text_config=text_args(attention_dropout=0.0), vq_config=vision,
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 9} | codes,
    )  # fmt: skip
    return hf.Emu3ForConditionalGeneration(config)


_QFORMER = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "encoder_hidden_size": 32,
}  # fmt: skip


def _opt() -> hf.OPTConfig:
    return hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip


def _blip_2() -> hf.PreTrainedModel:
    config = hf.Blip2Config(
        vision_config=vision_args(), qformer_config=_QFORMER, text_config=_opt(), num_query_tokens=64,
        image_token_index=IMAGE,
    )  # fmt: skip
    return hf.Blip2ForConditionalGeneration(config)


def _instructblip() -> hf.PreTrainedModel:
    config = hf.InstructBlipConfig(
        vision_config=vision_args(), qformer_config=_QFORMER, text_config=hf.LlamaConfig(**text_args()),
        num_query_tokens=64, image_token_index=IMAGE,
    )  # fmt: skip
    return hf.InstructBlipForConditionalGeneration(config)


def _instructblipvideo() -> hf.PreTrainedModel:
    config = hf.InstructBlipVideoConfig(
        vision_config=vision_args(), qformer_config=_QFORMER, text_config=hf.LlamaConfig(**text_args()),
        num_query_tokens=16, video_token_index=IMAGE,
    )  # fmt: skip
    return hf.InstructBlipVideoForConditionalGeneration(config)


def _last_words(ids: Tensor) -> Tensor:
    return ids[:, -8:]


def _kosmos_2() -> hf.PreTrainedModel:
    text = {
        "vocab_size": VOCAB, "embed_dim": HIDDEN, "layers": 2, "ffn_dim": 128, "attention_heads": 4,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False,
    }  # fmt: skip
    config = hf.Kosmos2Config(
        text_config=text, vision_config=vision_args(), latent_query_num=64, tie_word_embeddings=False
    )
    return hf.Kosmos2ForConditionalGeneration(config)


def _git() -> hf.PreTrainedModel:
    config = hf.GitConfig(
        vision_config=vision_args(), vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return hf.GitForCausalLM(config)


def _kosmos_2_5() -> hf.PreTrainedModel:
    text = {
        "vocab_size": VOCAB, "embed_dim": HIDDEN, "layers": 2, "ffn_dim": 128, "attention_heads": 4,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "patch_embed_hidden_size": 192, "intermediate_size": 64, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_num_patches": 64,
    }  # fmt: skip
    config = hf.Kosmos2_5Config(text_config=text, vision_config=vision, latent_query_num=64, tie_word_embeddings=False)
    return hf.Kosmos2_5ForConditionalGeneration(config)


def _flattened_patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    row, column = torch.meshgrid(torch.arange(1, 9), torch.arange(1, 9), indexing="ij")
    places = torch.stack([row, column], -1).reshape(1, 64, 2).repeat(batch, 1, 1)
    return {"flattened_patches": torch.cat([places, torch.randn(batch, 64, 192, generator=generator)], -1)}


def _florence2() -> hf.PreTrainedModel:
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [32, HIDDEN], "num_heads": [2, 2], "num_groups": [2, 2],
        "window_size": 4, "projection_dim": HIDDEN, "drop_path_rate": 0.0,
    }  # fmt: skip
    text = hf.BartConfig(**_bart_args())
    config = hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=False)
    return hf.Florence2ForConditionalGeneration(config)


def _bart_args(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
        "decoder_start_token_id": EOS, "forced_eos_token_id": None, "tie_word_embeddings": False,
    } | changes  # fmt: skip


def _t5gemma2() -> hf.PreTrainedModel:
    shared = text_args(head_dim=16, query_pre_attn_scalar=16, sliding_window=32) | {
        "layer_types": ["sliding_attention", "full_attention"]
    }
    encoder = {
        "text_config": shared,
        "vision_config": hf.SiglipVisionConfig(**vision_args(patch_size=4), vision_use_head=False),
        "mm_tokens_per_image": 64, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
    }  # fmt: skip
    config = hf.T5Gemma2Config(
        encoder=hf.T5Gemma2EncoderConfig(**encoder), decoder=hf.T5Gemma2DecoderConfig(**shared),
        image_token_index=IMAGE, eoi_token_index=END, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.T5Gemma2ForConditionalGeneration(config)


def _blip() -> hf.PreTrainedModel:
    text = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "encoder_hidden_size": 32, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS, "sep_token_id": 3,
    }  # fmt: skip
    return hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config=vision_args()))


def _pix2struct() -> hf.PreTrainedModel:
    text = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": BOS, "use_cache": True,
    }  # fmt: skip
    vision = {
        "hidden_size": HIDDEN, "patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "seq_len": 64,
    }  # fmt: skip
    return hf.Pix2StructForConditionalGeneration(hf.Pix2StructConfig(text_config=text, vision_config=vision))


def _udop() -> hf.PreTrainedModel:
    config = hf.UdopConfig(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD, image_size=64, patch_size=8,
        tie_word_embeddings=False, max_2d_position_embeddings=64,
    )  # fmt: skip
    return hf.UdopForConditionalGeneration(config)


def _vision_encoder_decoder() -> hf.PreTrainedModel:
    decoder = hf.MBartConfig(**_bart_args(is_decoder=True, add_cross_attention=True, is_encoder_decoder=False))
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**vision_args()), decoder)
    config.decoder_start_token_id, config.pad_token_id = BOS, PAD
    return hf.VisionEncoderDecoderModel(config)


def _pp_formulanet() -> hf.PreTrainedModel:
    text = {name: x for name, x in _bart_args(decoder_start_token_id=BOS).items() if name != "encoder_ffn_dim"}
    vision = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128,
        "patch_size": 4, "window_size": 8, "global_attn_indexes": [1], "mlp_dim": 64, "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16, "post_conv_out_channels": 32, "decoder_hidden_size": HIDDEN,
    }  # fmt: skip
    return hf.PPFormulaNetForConditionalGeneration(hf.PPFormulaNetConfig(text_config=text, vision_config=vision))


def _pi0() -> hf.PreTrainedModel:
    gemma = text_args(num_key_value_heads=1, head_dim=16)
    vlm = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**gemma), image_token_index=IMAGE, projection_dim=HIDDEN, hidden_size=HIDDEN,
        vision_config=hf.SiglipVisionConfig(**vision_args(), vision_use_head=False),
    )  # fmt: skip
    config = hf.PI0Config(
        vlm_config=vlm, dit_config=hf.GemmaConfig(**gemma), chunk_size=10, max_state_dim=8, max_action_dim=8
    )
    return hf.PI0ForConditionalGeneration(config)


def _camera(batch: int, generator: Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(batch, 1, 3, 64, 64, generator=generator),
        "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool),
        "state": torch.randn(batch, 8, generator=generator),
        "noise": torch.randn(batch, 10, 8, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
    }


def _diffusion_gemma() -> hf.PreTrainedModel:
    text = hf.DiffusionGemmaTextConfig(
        **text_args(head_dim=16), sliding_window=32, global_head_dim=32, num_experts=4, top_k_experts=2,
        layer_types=["sliding_attention", "full_attention"], moe_intermediate_size=32, final_logit_softcapping=30.0,
    )  # fmt: skip
    vision = hf.Gemma4VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, patch_size=4, pooling_kernel_size=2, position_embedding_size=32,
    )  # fmt: skip
    config = hf.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, boi_token_id=START, eoi_token_id=END,
        canvas_length=8,
    )  # fmt: skip
    return hf.DiffusionGemmaForBlockDiffusion(config)


def _evolla() -> hf.PreTrainedModel:
    protein = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": PAD, "token_dropout": False,
    }  # fmt: skip
    config = hf.EvollaConfig(
        **text_args(), protein_encoder_config=protein, aligner_num_add_layers=1, resampler_depth=1,
        resampler_dim_head=16, resampler_heads=2, resampler_num_latents=16, use_cache=True,
    )  # fmt: skip
    return open_gates(hf.EvollaForProteinText2Text(config), "gate", 1.0)


def _protein(batch: int, generator: Generator) -> dict[str, Tensor]:
    ids = torch.randint(FIRST_WORD, VOCAB, (batch, 48), generator=generator)
    return {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


def _start(token: int) -> Callable[[Tensor], Tensor]:
    """Return what gives the decoder its first token, and nothing else."""
    return lambda ids: torch.full_like(ids[:, :1], token)


def _boxes(ids: Tensor) -> Tensor:
    return torch.tensor([0.1, 0.2, 0.5, 0.6]).expand(*ids.shape, -1)


def _to_decoder(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments of a model whose encoder sees pixels only."""
    ids = given["input_ids"]
    pixels = {name: x for name, x in given.items() if name not in ("input_ids", "attention_mask")}
    return {"decoder_input_ids": ids[:, :1], **pixels}


_ONE_TOKEN = ("prompt of one token", "cross-attention") * 2

FAMILIES = {
    # 8 rows of 7 features and a newline, a separator, and 4 rows of 4 and a newline of the whole image.
    "phi4_multimodal": Family(_phi4_multimodal, _tiles, image_tokens=8 * 8 + 1 + 4 * 5, text_model="model"),
    "fuyu": Family(_fuyu, images(64, 8 * 8 * 3)),
    "chameleon": Family(_chameleon, images(3, 32, 32), text_model="model"),
    # 8 rows of 8 tokens and an end of line.
    "emu3": Family(_emu3, images(3, 32, 32, image_sizes=[32, 32]), image_tokens=8 * 9, text_model="model.text_model"),
    "blip_2": Family(
        _blip_2, images(3, 64, 64), text_model="language_model.model.decoder", inner="language_model"
    ),
    "instructblip": Family(
        _instructblip, images(3, 64, 64), by_token={"qformer_input_ids": _last_words},
        text_model="language_model.model", inner="language_model",
    ),
    "instructblipvideo": Family(
        _instructblipvideo, images(4, 3, 64, 64), by_token={"qformer_input_ids": _last_words},
        text_model="language_model.model", inner="language_model",
    ),
    "kosmos_2": Family(
        _kosmos_2, images(3, 64, 64), by_token={"image_embeds_position_mask": is_image},
        text_model="text_model.model", inner="text_model",
    ),
    # The image stands before the prompt, without tokens of its own.
    "git": Family(_git, images(3, 64, 64), image_tokens=0, text_model="git.encoder"),
    "kosmos_2_5": Family(
        _kosmos_2_5, _flattened_patches, by_token={"image_embeds_position_mask": is_image},
        text_model="text_model.model",
    ),
    "florence2": Family(
        _florence2, images(3, 64, 64), image_tokens=65, by_token={"decoder_input_ids": _start(EOS)},
        decoder=_ONE_TOKEN, text_model="model.language_model.decoder",
    ),
    # One attention over the decoder's and the encoder's keys.
    "t5gemma2": Family(
        _t5gemma2, images(3, 64, 64), around=MARKED, by_token={"decoder_input_ids": _start(BOS)},
        decoder=(OWN_LAYER, "latent KV cache"), text_model="model.decoder",
    ),
    "blip": Family(
        _blip, images(3, 64, 64), prompt=long_text, decoder=(REWRITTEN, "cross-attention") * 2,
        text_model="text_decoder.bert.encoder", inner="text_decoder",
    ),
    "pix2struct": Family(
        _pix2struct, _flattened_patches, arguments=_to_decoder, decoder=_ONE_TOKEN, text_model="decoder", pads=False
    ),
    # Dynamo cannot trace the indices of its encoder, with any backend.
    "udop": Family(
        _udop, images(3, 64, 64), prompt=long_text, by_token={"bbox": _boxes, "decoder_input_ids": _start(PAD)},
        decoder=_ONE_TOKEN, text_model="decoder", inner="decoder",
    ),
    "vision_encoder_decoder": Family(
        _vision_encoder_decoder, images(3, 64, 64), arguments=_to_decoder, decoder=_ONE_TOKEN,
        text_model="decoder.model.decoder", pads=False,
    ),
    "pp_formulanet": Family(
        _pp_formulanet, images(3, 128, 128), arguments=_to_decoder, decoder=_ONE_TOKEN,
        text_model="model.decoder", pads=False,
    ),
    # One step of its flow: the actions attend to the cached prompt and to each other.
    "pi0": Family(
        _pi0, _camera, decoder=("the layer's cache is read again",) * 2 + (REWRITTEN, REWRITTEN),
        text_model="model.vlm.language_model", generates=False,
    ),
    # One step of its diffusion, whose own loop is random: the canvas attends to the cached prompt and to itself.
    "diffusion_gemma": Family(
        _diffusion_gemma, positioned_patches, around=MARKED,
        by_token={"mm_token_type_ids": is_image, "decoder_input_ids": _last_words},
        decoder=("sliding window", REWRITTEN, OWN_LAYER, OWN_LAYER),
        text_model="model.encoder.language_model", generates=False,
    ),
    # A protein in the place of an image.
    "evolla": Family(
        _evolla, _protein, prompt=long_text, text_model="model"
    ),
}  # fmt: skip
