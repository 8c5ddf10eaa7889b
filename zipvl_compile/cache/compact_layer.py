"""The KV cache layer: a logical length for Hugging Face, the kept tokens in memory.

Defining `CompactLayer` registers it with transformers, so that every `DynamicCache(config=...)` uses it for its
full-attention layers, also the caches that `generate` and `forward` make. Outside the zipvl backend it behaves as
transformers' `DynamicLayer` does.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from zipvl_compile.cache.eager_fallback import check_generate_is_compiled, read_in_eager
from zipvl_compile.gradients import tracing_for_zipvl
from zipvl_compile.kernels.decode_attention import cached_positions
from zipvl_compile.kernels.kv_view import UNREADABLE
from zipvl_compile.kernels.ops import ops


def spare_tokens(n: int) -> int:
    """Return the room for decoding that a cache of `n` logical tokens gets: n / 16, from 32 to 1024 tokens.

    It depends on the logical length only, so that the layers run out of room, and grow, at the same step.
    """
    return min(max(n // 16, 32), 1024)


class CompactLayer(DynamicLayer):
    """Keys and values of one decoder layer, compacted after prefill.

    Attributes:
        key_buffer, value_buffer: `[B, Hkv, capacity, D]`, or None before the first update. They hold the kept prompt
            tokens, then every later token, then spare rows.
        positions: int64 `[B, G, P]`, where the kept prompt tokens stood; None while the layer holds a plain full cache.
        prompt_length: length of the compacted prompt (tokens).
        cumulative_length: logical length (tokens), what `get_seq_length` reports.
    """

    _layer_type = "full_attention"
    key_buffer: torch.Tensor = None  # type: ignore[assignment]
    value_buffer: torch.Tensor = None  # type: ignore[assignment]
    positions: torch.Tensor = None  # type: ignore[assignment]
    prompt_length: int = 0
    cumulative_length: int = 0

    # transformers reads and assigns `keys` and `values`; they are the rows of the buffers that are in use.
    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """Return the cached keys `[B, Hkv, cached_length, D]`: kept prompt tokens, then every later token."""
        if self.key_buffer is None:
            return None  # type: ignore[return-value]
        return self.key_buffer[:, :, : self.cached_length]

    @keys.setter
    def keys(self, value: torch.Tensor) -> None:
        self.key_buffer = value

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """Return the cached values `[B, Hkv, cached_length, Dv]`."""
        if self.value_buffer is None:
            return None  # type: ignore[return-value]
        return self.value_buffer[:, :, : self.cached_length]

    @values.setter
    def values(self, value: torch.Tensor) -> None:
        self.value_buffer = value

    @property
    def cached_length(self) -> int:
        """Return the number of tokens in memory."""
        dropped = 0 if self.positions is None else self.prompt_length - self.positions.shape[2]
        return self.cumulative_length - dropped

    @property
    def cached_positions(self) -> torch.Tensor | None:
        """Return where each cached token stands in the sequence: int64 `[B, G, cached_length]`, or None if empty."""
        if self.key_buffer is None:
            return None
        if self.positions is None:
            every = torch.arange(self.cumulative_length, device=self.key_buffer.device)
            return every.repeat(self.key_buffer.shape[0], 1, 1)
        return cached_positions(self.positions, self.prompt_length, self.cumulative_length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer, self.value_buffer = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys `[B, Hkv, m, D]` and values `[B, Hkv, m, Dv]` of m new tokens; return all of them.

        Raises:
            ValueError: tensors that do not continue this cache; the cache is unchanged then.
            RuntimeError: a compacted cache is read by an attention that zipvl did not rewrite.
        """
        if self.cumulative_length > 0:
            self._check_continues(key_states, value_states)
        if torch.compiler.is_compiling() and tracing_for_zipvl():
            if self.cumulative_length == 0:
                return self._prefill(key_states, value_states)
            if self.positions is not None:
                return self._decode(key_states, value_states)
        elif self.positions is not None:
            return self._update_outside(key_states, value_states)
        elif self.cumulative_length == 0 and not torch.compiler.is_compiling():
            check_generate_is_compiled()
        return self._extend_full(key_states, value_states)

    def _check_continues(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, new, old in (
            ("key_states", key_states, self.key_buffer),
            ("value_states", value_states, self.value_buffer),
        ):
            expected = (*old.shape[:2], old.shape[3])
            if (*new.shape[:2], new.shape[3]) != expected:
                raise ValueError(
                    f"{name}: expected [batch, KV heads, tokens, head_dim] with batch, heads and head_dim {expected} "
                    f"like the cached ones, got {tuple(new.shape)}. Continue each cache with the batch and the model "
                    "that filled it."
                )

    def _prefill(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the prompt. The passes put a selection in the place of `token_positions`, which keeps every token."""
        n = k.shape[2]
        spare = spare_tokens(n)
        self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
        self.positions = ops.token_positions(k)
        self.key_buffer = ops.gather_tokens(k, self.positions, spare)
        self.value_buffer = ops.gather_tokens(v, self.positions, spare)
        self.prompt_length = self.cumulative_length = n
        return k, v

    def _decode(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append in place; return views of logical length, which the passes rewrite to read the buffers."""
        self._append(k, v)
        where = (self.positions, self.prompt_length, self.cumulative_length)
        return ops.kv_view(self.key_buffer, *where), ops.kv_view(self.value_buffer, *where)

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        at, m = self.cached_length, k.shape[2]
        if at + m > self.key_buffer.shape[2]:
            room = m + spare_tokens(self.cumulative_length)
            self.key_buffer = _with_room(self.key_buffer, at, room)
            self.value_buffer = _with_room(self.value_buffer, at, room)
        ops.append_tokens(self.key_buffer, self.value_buffer, k, v, at)
        self.cumulative_length = self.cumulative_length + m

    def _update_outside(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and give the physical tokens to attention that zipvl did not rewrite, where that is right.

        One new token sees every cached token, so the physical keys alone give the right answer. More tokens, or a
        padding mask, need masks of physical length, which the model does not make.
        """
        full = self.positions.shape[2] == self.prompt_length
        if not full and k.shape[2] != 1:
            raise RuntimeError(UNREADABLE.format(why=f"{k.shape[2]} new tokens came outside the compiled model."))
        self._append(k, v)
        if full or torch.compiler.is_compiling():
            return self.keys, self.values
        return read_in_eager(self.keys), self.values

    def _extend_full(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Behave as transformers' DynamicLayer: a full cache that grows by concatenation."""
        if self.cumulative_length == 0:
            self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
            self.key_buffer, self.value_buffer = torch.cat([k[:, :, :0], k], 2), torch.cat([v[:, :, :0], v], 2)
        else:
            self.key_buffer = torch.cat([self.key_buffer, k], 2)
            self.value_buffer = torch.cat([self.value_buffer, v], 2)
        self.cumulative_length = self.cumulative_length + k.shape[2]
        return self.key_buffer, self.value_buffer

    def get_seq_length(self) -> int:
        """Return the logical length in tokens: masks, position ids and M-RoPE count dropped tokens too."""
        return self.cumulative_length

    def reset(self) -> None:
        """Empty the layer."""
        self.key_buffer = self.value_buffer = self.positions = None  # type: ignore[assignment]
        self.prompt_length = self.cumulative_length = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number, more tokens than there are, or a cut through the compacted prompt of a batch
                of several samples; the layer is unchanged then.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected a negative number of tokens to remove, got {tokens_to_remove}. Negate it."
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        n = self.cumulative_length + tokens_to_remove
        if n < 0:
            raise ValueError(
                f"crop: expected at most {self.cumulative_length} tokens to remove, got {-tokens_to_remove}. "
                "Use reset() to empty the cache."
            )
        if self.positions is None:
            self.key_buffer, self.value_buffer = self.key_buffer[:, :, :n], self.value_buffer[:, :, :n]
        elif n < self.prompt_length:
            # Samples keep different tokens, and a cache is cropped layer by layer: refuse before the first is changed.
            if self.positions.shape[0] > 1:
                raise ValueError(
                    f"crop: expected a cut after the {self.prompt_length} compacted prompt tokens of a batch of "
                    f"{self.positions.shape[0]}, got one at {n}. Crop less, crop samples one by one "
                    "(batch_select_indices), or run the prompt again."
                )
            self.positions = self.positions[:, :, : int((self.positions < n).sum())]
            self.prompt_length = n
        self.cumulative_length = n

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select samples by `beam_idx`, for beam search."""
        self._for_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times."""
        self._for_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the samples at `indices`."""
        self._for_batch(lambda x: x[indices, ...])

    def _for_batch(self, change) -> None:
        if self.cumulative_length > 0:
            self.key_buffer, self.value_buffer = change(self.key_buffer), change(self.value_buffer)
            self.positions = None if self.positions is None else change(self.positions)


def _with_room(buffer: torch.Tensor, used: int, room: int) -> torch.Tensor:
    """Copy the first `used` rows into a buffer with `room` more (tokens)."""
    return torch.cat([buffer[:, :, :used], buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])], 2)
