"""The tokens that a compacted layer does not keep, where they are not lost: in host memory, or at few bits.

They are stored when a prompt is, and come back when a later part of it, a later turn or a re-selection asks for them.
Traced by the cache layers; the passes put a selection in the place of the positions that they are the others of.
"""

from __future__ import annotations

from typing import Any

import torch

from zipvl_compile.kernels.common.codes import GROUP, groups_of
from zipvl_compile.kernels.ops import ops
from zipvl_compile.traced_options import evict_bits, evicts_to

#: Attributes of a layer that hold them: full precision on the host, or codes with their scales.
EVICTED = ("other_keys", "other_values", "key_scales", "value_scales")


def evicts() -> bool:
    """Return whether the call that is traced stores the tokens that a layer does not keep."""
    return evicts_to() in ("host", "quantize")


def store_others(layer: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store the tokens of `k [B, Hkv, n, D]` and `v [B, Hkv, n, Dv]` that are not at the positions of a layer."""
    if not evicts():
        if layer.other_keys is not None:
            forget_others(layer)
        return
    others = ops.other_tokens(layer.positions, k.shape[2])
    if evicts_to() == "host":
        layer.other_keys, layer.other_values = ops.to_host(k, others), ops.to_host(v, others)
        return
    bits = evict_bits()
    layer.other_keys, layer.key_scales = ops.quantise_tokens(k, others, bits, "channel")
    layer.other_values, layer.value_scales = ops.quantise_tokens(v, others, bits, "token")


def forget_others(layer: Any) -> None:
    """Have a layer hold nothing but its kept tokens."""
    for name in EVICTED:
        setattr(layer, name, None)


def recalled(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of every token of a compacted layer, in order: `[B, Hkv, n, D]` and `[.., Dv]`."""
    return (
        _whole(layer, layer.key_buffer, layer.other_keys, layer.key_scales),
        _whole(layer, layer.value_buffer, layer.other_values, layer.value_scales),
    )


def _whole(layer: Any, buffer: torch.Tensor, others: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    positions, n = layer.positions, layer.prompt_length
    prompt = ops.restore_tokens(buffer, positions, others, scales, n)
    return torch.cat([prompt, buffer[:, :, positions.shape[2] : layer.cached_length]], 2)


def cut_others(layer: Any) -> None:
    """Give up the other tokens behind the end of a prompt that was cut."""
    if layer.other_keys is None:
        return
    count = layer.prompt_length - layer.positions.shape[2]
    groups = groups_of(count)
    rows = count if layer.key_scales is None else groups * GROUP
    layer.other_keys, layer.other_values = layer.other_keys[:, :, :rows], layer.other_values[:, :, :rows]
    if layer.key_scales is not None:
        layer.key_scales, layer.value_scales = layer.key_scales[:, :, :groups], layer.value_scales[:, :, :rows]
