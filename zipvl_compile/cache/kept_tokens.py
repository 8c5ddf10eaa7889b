"""Which prompt tokens each layer of a cache kept."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from zipvl_compile.cache.compact_layer import CompactLayer


def kept_tokens(past_key_values: Cache) -> list[torch.Tensor | None]:
    """Return the positions that each layer's KV cache holds.

    Args:
        past_key_values: the cache of a `generate` or `forward` call.

    Returns:
        One entry per layer: int64 `[B, G, P]`, ascending positions in the sequence, `G = 1` for one selection per
        layer; None for layers of another kind (sliding window, linear attention) and for empty layers.

    Raises:
        TypeError: not a Hugging Face cache.
    """
    if not isinstance(past_key_values, Cache):
        raise TypeError(
            f"past_key_values: expected a transformers Cache, got {type(past_key_values).__name__}. "
            "Pass out.past_key_values, or generate(..., return_dict_in_generate=True).past_key_values."
        )
    return [layer.cached_positions if isinstance(layer, CompactLayer) else None for layer in past_key_values.layers]
