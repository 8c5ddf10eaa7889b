"""What a tiny family of vision-language models is: how to build it, how its prompts look, what zipvl should do to it.

Every model is random and built from its config: 2 decoder layers where the family allows it, hidden size 64, 4 query
heads and, where the family has GQA, 2 KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor

VOCAB, PAD, BOS, EOS, IMAGE, VIDEO, START, END, FIRST_WORD = 200, 0, 1, 2, 5, 6, 7, 8, 10
HIDDEN = 64
REWRITTEN = ""
OWN_LAYER = "KV cache without zipvl layers"
OTHER_CACHE = "the KV cache holds something else"
OTHER_LAYER = "no KV cache of its own"


@dataclass(frozen=True)
class Family:
    """How to build a family, how its prompts look, and what should become of its attention.

    Attributes:
        build: gives the model with Hugging Face's own weights.
        pixels: gives the image arguments of `batch` samples.
        image_tokens: image tokens of one sample (tokens).
        around: tokens directly before and after the image tokens.
        by_token: further arguments of shape `[batch, n]`, made from `input_ids`.
        prompt: gives `input_ids [batch, n]` of full length, for prompts that are not BOS, image, words; called with
            batch, words and a generator. Padding and `by_token` are added to what it gives.
        arguments: gives the arguments under the family's own names, from all of the above, where these differ.
        decoder: the decoder's attention sites of a prefill in execution order, self- and cross-attention: `REWRITTEN`,
            or how the reason starts for which a site stays dense.
        text_model: path of the decoder whose `layers` hold these sites.
        inner: path of the module that `generate` drives, where it is not the model itself.
        generates: whether the family's own `generate` takes these inputs.
        pads: whether `generate` takes left-padded batches.
        makes_cache: whether `forward` makes the cache that it is not given.
        broken_in: versions of transformers, such as "5.24", in which the family's own eager code fails.
    """

    build: Callable[[], hf.PreTrainedModel]
    pixels: Callable[[int, Generator], dict[str, Tensor]]
    image_tokens: int = 64
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    by_token: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    prompt: Callable[[int, int, Generator], Tensor] | None = None
    arguments: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    decoder: tuple[str, ...] = (REWRITTEN, REWRITTEN)
    text_model: str = "model.language_model"
    inner: str = ""
    generates: bool = True
    pads: bool = True
    makes_cache: bool = True
    broken_in: str = ""


def text_args(**changes: Any) -> dict[str, Any]:
    """Return the arguments that nearly every text config takes."""
    return {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False,
    } | changes  # fmt: skip


def vision_args(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a vision transformer over 64 x 64 pixels in 8 x 8 patches."""
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 8,
    } | changes  # fmt: skip


def images(*size: int, **extra: list[int]) -> Callable[[int, Generator], dict[str, Tensor]]:
    """Return pixels of shape `[batch, *size]`, with one row of every `extra` integer argument a sample."""

    def pixels(batch: int, generator: Generator) -> dict[str, Tensor]:
        rows = {name: torch.tensor([row] * batch) for name, row in extra.items()}
        return {"pixel_values": torch.randn(batch, *size, generator=generator), **rows}

    return pixels


def patches(batch: int, generator: Generator) -> dict[str, Tensor]:
    """Return the flattened 4 x 4 patches, two frames each, of one 64 x 64 image a sample."""
    pixels = torch.randn(batch * 16 * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 16, 16]] * batch)}


def is_image(ids: Tensor) -> Tensor:
    """Return 1 at image tokens and 0 elsewhere."""
    return (ids == IMAGE).long()


MARKED = ((START,), (END,))
