"""A compacted cache that an interrupted forward left uneven is an error, not a wrong answer."""

from __future__ import annotations

from zipvl_compile.dynamo import UserError
from zipvl_compile.passes.match.cache_lengths import uneven_layers
from zipvl_compile.passes.match.sites import Sites


class UnevenCacheError(UserError):
    """Layers of one cache hold unlike numbers of tokens."""


def check_layers_agree(sites: Sites) -> None:
    """Check that the layers of the cache that a graph reads hold equally many tokens.

    Raises:
        UnevenCacheError: they do not; the graph is not compiled, and no token is added to the cache.
    """
    uneven = uneven_layers(sites)
    if uneven:
        held = " and ".join(f"{n} in {name}" for name, n in uneven)
        raise UnevenCacheError(
            f"cache: expected equally many tokens in every layer, got {held}, the new ones included: an earlier "
            "forward on this cache was interrupted. Run the prompt again with a new cache, or cut the layers that are "
            "ahead: for layer in cache.layers: layer.crop(n - layer.get_seq_length()), where n is the shortest length."
        )
