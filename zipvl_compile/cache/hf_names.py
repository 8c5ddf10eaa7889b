"""What Hugging Face models call their KV cache: `cache` since transformers 5.24, `past_key_values` before.

The newer one warns of the older name (an error from 5.40 on), and the older one does not know the newer.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache

CACHE_NAMES = ("cache", "past_key_values")


def _declared(function: Any) -> str | None:
    names = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in names), None)


#: The name in the transformers installed.
CACHE_NAME: str = _declared(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]


def as_argument(cache: Cache | None, forward: Any = None) -> dict[str, Cache | None]:
    """Return a cache as a keyword argument: `model(input_ids=token, **as_argument(cache))`.

    Args:
        cache: to pass.
        forward: the function that takes it, such as `model.forward`; what it declares wins over what is usual in the
            transformers installed, for models whose code comes with their weights.
    """
    return {(forward is not None and _declared(forward)) or CACHE_NAME: cache}


def cache_of(output: Any) -> Cache | None:
    """Return the cache in the output of a `forward` or `generate`, or None where there is none."""
    cache = getattr(output, CACHE_NAME, None)
    return cache if isinstance(cache, Cache) else None
