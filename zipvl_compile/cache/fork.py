"""One prefix, several continuations: caches that share what is in memory until one of them grows."""

from __future__ import annotations

import copy
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.hf_names import cache_of

#: Layers that never write into the tensors that they hold, or know that others hold them, too.
SHARING = (CompactLayer, DynamicLayer, DynamicSlidingWindowLayer)


def fork(cache: Any) -> Cache:
    """Return a cache that goes on from another one: a picture and a system prompt once, with different questions.

        prefix = model(**inputs, use_cache=True)
        for question in questions:
            model.generate(question_ids, cache=zipvl_compile.fork(prefix))

    No token is copied before one of the two grows, and then by the one that grows. Layers of other kinds than
    transformers' dynamic ones and those of this package are copied at once.

    Args:
        cache: of a `generate` or `forward` call, or the output of one that holds it; it stays as it is.

    Returns:
        The other one, with layers of its own.

    Raises:
        TypeError: neither a Hugging Face cache of layers nor an output with one.
    """
    held = cache if isinstance(cache, Cache) else cache_of(cache)
    if held is None or not isinstance(getattr(held, "layers", None), list):
        got = type(cache if held is None else held).__name__
        raise TypeError(
            f"cache: expected a transformers Cache of layers or an output that holds one, got {got}. Pass what the "
            "model returned, or copy.deepcopy the cache."
        )
    new = copy.copy(held)
    new.layers = [copy.copy(one) if type(one) in SHARING else copy.deepcopy(one) for one in held.layers]
    return new
