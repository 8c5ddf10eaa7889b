"""A Gemma 3 of two layers with random weights, and its processor, on disk: lmms-eval asks it in padded batches."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from zipvl_compile.demo.tiny_lvlm.canvas import SMALL
from zipvl_compile.demo.tiny_lvlm.questions import vocabulary

IMAGE_TOKENS, SIDE = 64, 32
SPECIAL = ("<start>", "<end>", "<soft>", "<eot>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<start>{%- elif part['type'] == 'text' -%}{{ ' ' + part['text'] + ' ' }}{%- endif -%}
{%- endfor -%}{%- endfor -%}"""


def write_gemma(folder: Path) -> Path:
    """Write the model and its processor into a folder; return the folder."""
    ids = {word: index for index, word in enumerate((*vocabulary(SMALL), *SPECIAL))}
    text = Gemma3TextConfig(
        vocab_size=len(ids), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=ids["<pad>"], bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eot>"],
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=IMAGE_TOKENS, boi_token_index=ids["<start>"],
        eoi_token_index=ids["<end>"], image_token_index=ids["<soft>"], tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    # Scores far enough apart that the best of them is the same in whatever order bfloat16 is summed.
    torch.nn.init.normal_(model.lm_head.weight, std=4.0)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = ids["<pad>"], ids["<eot>"]
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eot>", unk_token="<unk>",
        extra_special_tokens={"boi_token": "<start>", "eoi_token": "<end>", "image_token": "<soft>"},
        padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    pictures = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    Gemma3Processor(pictures, fast, CHAT_TEMPLATE, image_seq_length=IMAGE_TOKENS).save_pretrained(folder)
    return folder
