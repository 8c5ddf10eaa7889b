"""Which prompt tokens each layer of a cache kept."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.compact_static_layer import CompactStaticLayer
from zipvl_compile.cache.hf_names import cache_of

#: Layers that hold the kept tokens of a prompt alone.
COMPACT = (CompactLayer, CompactStaticLayer)


def kept_tokens(cache: Any) -> list[torch.Tensor | None]:
    """Return the positions that each layer's KV cache holds.

    Args:
        cache: of a `generate` or `forward` call, or the output of one that holds it.

    Returns:
        One entry per layer: int64 `[B, G, P]`, ascending positions in the sequence, `G = 1` for one selection per
        layer; None for layers of another kind (sliding window, linear attention) and for empty layers.

    Raises:
        TypeError: neither a Hugging Face cache nor an output with one.
    """
    held = cache if isinstance(cache, Cache) else cache_of(cache)
    if held is None:
        raise TypeError(
            f"cache: expected a transformers Cache or an output that holds one, got {type(cache).__name__}. Pass what "
            "the model returned, or what generate(..., return_dict_in_generate=True) returned."
        )
    return [layer.cached_positions if isinstance(layer, COMPACT) else None for layer in held.layers]
