"""The untrained parts: model configuration and initial weights, tokenizer, processor."""

import math
from functools import lru_cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from zipvl_compile.demo.tiny_lvlm.canvas import CELL, SMALL, Canvas
from zipvl_compile.demo.tiny_lvlm.questions import BOS, EOS, IMAGE, PAD, UNKNOWN, vocabulary

PIXEL_MEAN, PIXEL_STD = 0.3, 0.25


@lru_cache(maxsize=2)
def word_ids(canvas: Canvas) -> dict[str, int]:
    """The token of every word, for pictures of a canvas."""
    return {word: index for index, word in enumerate(vocabulary(canvas))}


def context_length(canvas: Canvas) -> int:
    """How many tokens a prompt may have."""
    return max(1024, 2 * canvas.tokens)


def build_config(canvas: Canvas = SMALL) -> LlavaConfig:
    """A CLIP tower before a Llama of 4 layers with 2 key-value heads.

    Where a picture has thousands of patches, the tower has one layer of one head instead of 2 of 4, since it stays
    dense and would take most of the time; the decoder has 8 query heads instead of 4, and positions turn more slowly.
    """
    ids, large = word_ids(canvas), canvas.is_large
    vision = CLIPVisionConfig(
        hidden_size=64 if large else 96,
        intermediate_size=512 if large else 256,
        num_hidden_layers=1 if large else 2,
        num_attention_heads=1 if large else 4,
        image_size=canvas.size,
        patch_size=CELL,
        projection_dim=64 if large else 96,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8 if large else 4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6 if large else 1e4},
        max_position_embeddings=context_length(canvas),
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=canvas.tokens,
        tie_word_embeddings=False,
    )


def build_model(seed: int, canvas: Canvas = SMALL) -> LlavaForConditionalGeneration:
    """A model with the initial weights that training starts from."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(canvas))
    language = model.model.language_model
    # The customary 0.02 is far too small for 128 features: attention stays uniform and nothing is learnt.
    for parameter in language.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.normal_(language.embed_tokens.weight, std=1.0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    residual_scale = 1 / math.sqrt(2 * len(language.layers))
    with torch.no_grad():
        for layer in language.layers:
            # Every first query head of a group starts out equal to its key head, so that words look at
            # patches that say the same word.
            keys = layer.self_attn.k_proj.weight.unflatten(0, (-1, layer.self_attn.head_dim))
            queries = layer.self_attn.q_proj.weight.unflatten(0, (len(keys), -1, layer.self_attn.head_dim))
            queries[:, 0] = keys
            layer.self_attn.o_proj.weight *= residual_scale
            layer.mlp.down_proj.weight *= residual_scale
    if canvas.is_large:  # so that a row or a column is learnt once, and not for every cell
        table = model.model.vision_tower.embeddings.position_embedding.weight
        rows, columns = 0.2 * torch.randn(2, canvas.grid, table.shape[1])
        with torch.no_grad():
            table[1:] = (rows[:, None] + columns).flatten(0, 1)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        torch.nn.init.xavier_uniform_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    ids = word_ids(canvas)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    return model


def build_tokenizer(canvas: Canvas = SMALL) -> PreTrainedTokenizerFast:
    """One token per word; texts start with ``<bos>``; batches are padded on the left, for ``generate``."""
    ids = word_ids(canvas)
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=context_length(canvas),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor(canvas: Canvas = SMALL) -> LlavaProcessor:
    """Turns pictures of a canvas and texts holding ``<image>`` into the inputs of the model."""
    side = {"height": canvas.size, "width": canvas.size}
    # The PIL variant: the default one needs torchvision.
    image_processor = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_resize=True,
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(canvas),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        image_token=IMAGE,
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """What the processor does: uint8 (..., height, width, 3) to float32 (..., 3, height, width)."""
    return ((images.float() / 255 - PIXEL_MEAN) / PIXEL_STD).movedim(-1, -3)
