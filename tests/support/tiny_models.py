"""Tiny random models of every family, and prompts for them.

`model(family)` gives an eager model, `compiled(family, tau=...)` the same model compiled in place with zipvl, and
`inputs(family, ...)` a prompt of mostly image tokens with everything that the family's `generate` and `forward` take.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families import glm_like, google, idefics_like, llava_like, llava_video_and_ocr, qwen_like, with_encoders
from families.family import BOS, FIRST_WORD, IMAGE, PAD, VOCAB, Family
from support.tiny_llama import widened
from torch import Tensor

FAMILIES: dict[str, Family] = (
    llava_like.FAMILIES
    | llava_video_and_ocr.FAMILIES
    | qwen_like.FAMILIES
    | glm_like.FAMILIES
    | google.FAMILIES
    | idefics_like.FAMILIES
    | with_encoders.FAMILIES
)


def model(family: str, attention: str = "sdpa") -> hf.PreTrainedModel:
    """Return the eager model in eval mode; every call gives the same weights."""
    built = widened(FAMILIES[family].build)
    if built.can_generate():
        built.generation_config.pad_token_id = PAD
    if attention != "sdpa":
        built.set_attn_implementation(attention)
    return built


def compiled(family: str, **options: Any) -> hf.PreTrainedModel:
    """Return the model compiled in place with zipvl, by default without Inductor and for prompts of any length."""
    built = model(family)
    part = built.get_submodule(FAMILIES[family].inner)  # "" is the model itself
    part.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0} | options)
    return built


def inputs(family: str, batch: int = 1, text: int = 12, pad: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Return prompts of equal length that end in `text` words; padding stands for `pad` words of the first sample."""
    kind = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    ids = _prompt(kind, batch, text, generator)
    mask = torch.ones_like(ids)
    if pad:
        ids[0] = torch.cat([torch.full((pad,), PAD), ids[0, :-pad]])
        mask[0, :pad] = 0
    by_token = {name: make(ids) for name, make in kind.by_token.items()}
    return kind.arguments({"input_ids": ids, "attention_mask": mask, **by_token, **kind.pixels(batch, generator)})


def _prompt(kind: Family, batch: int, text: int, generator: torch.Generator) -> Tensor:
    if kind.prompt is not None:
        return kind.prompt(batch, text, generator)
    before, after = kind.around
    image = torch.tensor([BOS, *before, *[IMAGE] * kind.image_tokens, *after])
    words = torch.randint(FIRST_WORD, VOCAB, (batch, text), generator=generator)
    return torch.cat([image.expand(batch, -1), words], 1)
