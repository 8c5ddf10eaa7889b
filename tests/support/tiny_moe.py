"""Tiny random language models with mixtures of experts: 2 layers, GQA 2, 4 experts."""

from __future__ import annotations

import transformers as hf
from support.tiny_llama import VOCAB, widened

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_local_experts": 4,
}  # fmt: skip
KINDS = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_experts_per_tok=2)),
    # The first layer has an MLP, the second one experts beside a shared one.
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES, num_experts_per_tok=1, intermediate_size_mlp=96, head_dim=16, interleave_moe_layer_step=2,
            no_rope_layers=[0, 0], attention_chunk_size=512,
        )
    ),
}  # fmt: skip


def model(kind: str) -> hf.PreTrainedModel:
    """Return the eager model in eval mode; every call gives the same weights."""
    return widened(KINDS[kind])
