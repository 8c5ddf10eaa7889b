"""A later part of a prompt, a later turn, or a re-selection: what there is, and what is new, is stored like a prompt.

The passes may put a selection in the place of `token_positions`, which keeps every token (`reselect_later_parts` for a
compacted cache, `sparsify_prefill` for one that holds every token).
"""

from __future__ import annotations

from typing import Any

import torch

from zipvl_compile.cache.buffers import spare_tokens
from zipvl_compile.cache.evicted import recalled, store_others
from zipvl_compile.kernels.ops import ops
from zipvl_compile.kernels.token_positions import cached_positions


def compact_again(layer: Any) -> None:
    """Store anew what a compacted `CompactLayer` has in memory, or anywhere, to which the new tokens were appended."""
    used, n = layer.cached_length, layer.cumulative_length
    layer.selected_from = used if layer.other_keys is None else n
    if layer.other_keys is not None:
        keys, values = recalled(layer)
        layer.positions = rows = ops.token_positions(keys)
        store_others(layer, keys, values)
    else:
        keys, values = layer.key_buffer[:, :, :used], layer.value_buffer[:, :, :used]
        rows = ops.token_positions(keys)
        at = cached_positions(layer.positions, layer.prompt_length, n)
        layer.positions = torch.take_along_dim(at, rows, 2)
    layer.key_buffer = ops.gather_tokens(keys, rows, spare_tokens(n))
    layer.value_buffer = ops.gather_tokens(values, rows, spare_tokens(n))
    layer.prompt_length = n


def continued(layer: Any, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of a layer that holds every token, with those of the new tokens behind them."""
    return torch.cat([layer.key_buffer, k], dim=-2), torch.cat([layer.value_buffer, v], dim=-2)
