"""A tiny random Llama: 2 layers, GQA 2. Its forward hides the module from the traced frame behind decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 128


def model(**changes) -> LlamaForCausalLM:
    """Return the eager model in eval mode; every call gives the same weights."""
    usual = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return widened(lambda: LlamaForCausalLM(LlamaConfig(**usual | changes)))


def widened(build: Callable[[], Any]) -> Any:
    """Return a model in eval mode that generates to the full length, with the same weights each time.

    They are wider than Hugging Face's initialisation, so that attention is not uniform and tokens differ.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        built = build().eval()
        for weight in built.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.15)
    if built.can_generate():
        built.generation_config.eos_token_id = None
    return built


def prompt(n: int = 40, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Return token ids `[batch, n]`."""
    return torch.randint(6, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))


def compiled(changes: dict | None = None, **options) -> LlamaForCausalLM:
    """Return the model, with `changes` of its configuration, compiled for zipvl by these options."""
    built = model(**changes or {})
    built.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0} | options)
    return built
