"""Prompts with images of many sizes, for tiny models that take them."""

from __future__ import annotations

import torch
from families.family import BOS, END, FIRST_WORD, IMAGE, START, VOCAB
from support import tiny_llava


def qwen_prompt(height: int, width: int, text: int = 12) -> dict[str, torch.Tensor]:
    """Return a prompt of Qwen2.5-VL over one image of `height` x `width` patches, both even: four make a token."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    tokens = height * width // 4
    words = torch.randint(FIRST_WORD, VOCAB, (text,), generator=generator)
    ids = torch.cat([torch.tensor([BOS, START]), torch.full((tokens,), IMAGE), torch.tensor([END]), words])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def llava_prompt(images: int, text: int = 8) -> dict[str, torch.Tensor]:
    """Return a prompt of the tiny LLaVA over several images of 64 tokens each."""
    x = tiny_llava.inputs(text=text)
    image = torch.full((1, tiny_llava.IMAGE_TOKENS * images), tiny_llava.IMAGE)
    ids = torch.cat([x["input_ids"][:, :1], image, x["input_ids"][:, -text:]], 1)
    pixels = torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(images))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
