"""More room in a static cache: for a further turn, or a generation that goes on after all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from zipvl_compile.cache.compact_static_layer import CompactStaticLayer
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.dynamo import mark_address_as_fixed
from zipvl_compile.kernels.fixed_rows import into_bucket


def grow(cache: Any, tokens: int) -> None:
    """Give a static cache room for further tokens, in place.

        out = model.generate(**first, cache=cache, return_dict_in_generate=True)
        zipvl_compile.grow(cache, 600)
        model.generate(**second, cache=cache, max_new_tokens=500)

    Compacted layers move to the bucket that their kept tokens and the new room need; decoding compiles once more unless
    it has met that size before. What others hold of the tensors (a CUDA graph, a view) stays as it was.

    Args:
        cache: a `StaticCache`, or the output of a call that holds one.
        tokens: how many more than the cache was made for, at least 1.

    Raises:
        TypeError: something without a cache of layers.
        ValueError: fewer than 1 token, or a layer that cannot grow; the cache is unchanged then.
    """
    held = cache if isinstance(cache, Cache) else cache_of(cache)
    if held is None or not isinstance(getattr(held, "layers", None), list):
        got = type(cache if held is None else held).__name__
        raise TypeError(
            f"cache: expected a StaticCache or an output that holds one, got {got}. Pass what generate took."
        )
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens: expected an integer of at least 1, got {tokens!r}. Pass how many more are to come.")
    growing = [(layer, number) for number, layer in enumerate(held.layers) if _grows(layer, number)]
    if not growing:
        raise ValueError(
            "cache: expected layers of fixed size, got none. Only a StaticCache runs out of room: others grow."
        )
    for layer, _ in growing:
        _give_room(layer, tokens)


def _grows(layer: Any, number: int) -> bool:
    if isinstance(layer, StaticSlidingWindowLayer):
        if layer._is_croppable:  # then it may hold fewer tokens than its window, whose size it does not know
            raise ValueError(
                f"cache: expected a sliding window in layer {number} that is as long as it gets, got one of "
                f"{layer.max_cache_len} tokens, the length of the cache. Make the cache longer than the window."
            )
        return False
    return isinstance(layer, StaticLayer)


def _give_room(layer: Any, tokens: int) -> None:
    layer.max_cache_len += tokens
    fixed: list[torch.Tensor]
    if not layer.is_initialized:
        return
    if isinstance(layer, CompactStaticLayer) and layer.where is not None:
        n, held = int(layer.cumulative_length), layer.cached_length
        rows = held + layer.max_cache_len - n
        later = torch.arange(n, layer.max_cache_len, device=layer.device).expand(*layer.where.shape[:2], -1)
        layer.where = into_bucket(torch.cat([layer.where[:, :, :held], later], 2))
        for name in ("key_buffer", "value_buffer"):
            used = getattr(layer, name)[:, :, :held]
            setattr(layer, name, into_bucket(F.pad(used, (0, 0, 0, rows - held))))
        fixed = [layer.key_buffer, layer.value_buffer, layer.where]
    else:
        layer.keys, layer.values = (F.pad(x, (0, 0, 0, tokens)) for x in (layer.keys, layer.values))
        fixed = [layer.keys, layer.values]
    for tensor in fixed:
        mark_address_as_fixed(tensor)
