"""What a KV cache holds after a prompt: tokens and bytes of every layer, and what was freed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.cache.kept_tokens import COMPACT

NOT_COMPACTED = "every token is kept: the prompt was left dense, see zipvl_compile.explain"


@dataclass(frozen=True)
class LayerStats:
    """One layer of a KV cache.

    Attributes:
        prompt_length: of the prompt that the layer was compacted from (tokens); 0 where it was not.
        kept: tokens of that prompt that it holds.
        tokens: that it holds in all, those after the prompt too.
        length: logical length of the sequence (tokens).
        bytes_used: of the tokens it holds, keys and values, those at few bits too, and of noted queries; and of
            whatever else a layer of another kind holds.
        bytes_allocated: of the memory behind them, with spare rows and positions.
        bytes_freed: what the other tokens of the prompt would take, less what they take at few bits.
        bytes_on_host: of the other tokens, in host memory.
        bits: of each number of the other tokens, where the layer holds them at few bits; else 0.
        bytes_at_selection: of all the tokens that it was last selected from; 0 where it was not.
        why_dense: why it was not compacted; empty where it was.
    """

    prompt_length: int
    kept: int
    tokens: int
    length: int
    bytes_used: int
    bytes_allocated: int
    bytes_freed: int
    why_dense: str = ""
    bytes_on_host: int = 0
    bits: int = 0
    bytes_at_selection: int = 0

    @property
    def share(self) -> float:
        """Return the share of the sequence that the layer holds, in [0, 1]."""
        return self.tokens / self.length if self.length else 1.0

    def __str__(self) -> str:
        if self.why_dense:
            return f"{self.tokens} of {self.length} tokens, {self.bytes_used:,} bytes; {self.why_dense}"
        others = f", others at {self.bits} bits" if self.bits else ""
        on_host = f", {self.bytes_on_host:,} on the host" if self.bytes_on_host else ""
        return (
            f"{self.kept} of {self.prompt_length} prompt tokens ({self.kept / self.prompt_length:.1%}){others}, "
            f"{self.bytes_used:,} bytes in use, {self.bytes_freed:,} freed{on_host}"
        )


@dataclass(frozen=True)
class CacheStats:
    """The layers of a KV cache, in order."""

    layers: tuple[LayerStats, ...]

    @property
    def bytes_used(self) -> int:
        return sum(layer.bytes_used for layer in self.layers)

    @property
    def bytes_allocated(self) -> int:
        return sum(layer.bytes_allocated for layer in self.layers)

    @property
    def bytes_freed(self) -> int:
        return sum(layer.bytes_freed for layer in self.layers)

    @property
    def bytes_dense(self) -> int:
        """Return what all tokens would take."""
        return self.bytes_used + self.bytes_freed

    @property
    def bytes_on_host(self) -> int:
        return sum(layer.bytes_on_host for layer in self.layers)

    @property
    def bytes_peak(self) -> int:
        """Return the most that was in memory at once: layers are selected from one after the other, and one is whole.

        While the last prompt, part, turn or re-selection was read, or now, whichever is more; without spare rows.
        """
        whole = max((layer.bytes_at_selection - layer.bytes_used for layer in self.layers), default=0)
        return self.bytes_used + max(whole, 0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, texts, lists and dicts, as JSON takes them."""
        totals = ("bytes_used", "bytes_allocated", "bytes_freed", "bytes_dense", "bytes_on_host", "bytes_peak")
        return {name: getattr(self, name) for name in totals} | {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        whole = self.bytes_dense
        used = f"{self.bytes_used / whole:.1%} of {whole:,} bytes" if whole else "nothing"
        head = f"zipvl: KV cache of {len(self.layers)} layers: {used} in use, {self.bytes_allocated:,} allocated"
        head += f", at most {self.bytes_peak:,} at once"
        head += f", {self.bytes_on_host:,} on the host" if self.bytes_on_host else ""
        return "\n".join([head, *(f"  layer {i}: {layer}" for i, layer in enumerate(self.layers))])


def stats(cache: Any) -> CacheStats:
    """Return what a KV cache holds.

    Args:
        cache: of transformers, or an output that has one.

    Raises:
        TypeError: something without a cache.
    """
    found = cache if hasattr(cache, "layers") else cache_of(cache)
    if found is None or not hasattr(found, "layers"):
        raise TypeError(
            f"stats: expected a cache of transformers, or an output that has one, got {type(cache).__name__}. "
            "Call the model with use_cache=True, and generate with return_dict_in_generate=True."
        )
    return CacheStats(tuple(_layer(layer) for layer in found.layers))


def _layer(layer: Any) -> LayerStats:
    used, per_token, on_host, storages = 0, 0, 0, {}
    compact = isinstance(layer, COMPACT)
    coded = getattr(layer, "key_scales", None) is not None
    for name, tensor in vars(layer).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if name in ("other_keys", "other_values") and not coded:
            on_host += tensor.numel() * tensor.element_size()
            continue
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        if compact and name in ("key_buffer", "value_buffer"):
            tensor = tensor[:, :, : layer.cached_length]
            per_token += tensor[:, :, :1].numel() * tensor.element_size()
        if name not in ("positions", "where", "held", "cumulative_length"):
            used += tensor.numel() * tensor.element_size()
    length, allocated = int(layer.get_seq_length()), sum(storages.values())
    if compact and layer.positions is not None:
        kept, tokens = layer.positions.shape[2], layer.cached_length
        dropped, bits = layer.prompt_length - kept, 0
        freed = per_token * dropped
        if coded:
            codes = (layer.other_keys, layer.other_values, layer.key_scales, layer.value_scales)
            freed -= sum(x.numel() * x.element_size() for x in codes)
            bits = 8 * layer.other_keys.shape[3] // layer.key_buffer.shape[3]
        why = "" if dropped else "every token is kept"
        return LayerStats(
            layer.prompt_length, kept, tokens, length, used, allocated, freed, why, on_host, bits if dropped else 0,
            per_token * layer.selected_from,
        )  # fmt: skip
    why = NOT_COMPACTED if compact else f"a {type(layer).__name__} is not compacted"
    keys = getattr(layer, "keys", None)
    tokens = keys.shape[2] if isinstance(keys, torch.Tensor) and keys.dim() == 4 else 0
    tokens = layer.cached_length if compact else tokens
    return LayerStats(0, tokens, tokens, length, used, allocated, 0, why)
