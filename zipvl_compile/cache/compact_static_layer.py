"""The static KV cache layer: kept tokens in tensors whose sizes stay the same from the first new token to the last.

Defining `CompactStaticLayer` registers it with transformers, so that `StaticCache`, which `generate` makes with
`cache_implementation="static"`, uses it for its full-attention layers. Until a prompt runs through a model that is
compiled for zipvl it is transformers' `StaticLayer`. A compacted layer has room for its kept tokens and for those that
the cache may still get, and counts them on the device, so that a decode step is one graph without a changing number:

    key_buffer [B, Hkv, C, D]     kept prompt tokens, every later token, rows to come
    where      [B, G, C]          int64: where the token of each row stands in the sequence
    held       []                 int64: how many rows are in use
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from zipvl_compile.cache.buffers import check_continues
from zipvl_compile.cache.eager_fallback import check_generate_is_compiled
from zipvl_compile.cache.kept_tensor import Held, mark
from zipvl_compile.cache.two_buffers import TwoBuffers
from zipvl_compile.compiling import generates_for_zipvl, length_asked_of_generate
from zipvl_compile.gradients import tracing_for_zipvl
from zipvl_compile.kernels.append_tokens import write_rows
from zipvl_compile.kernels.kv_view import UNREADABLE
from zipvl_compile.kernels.ops import ops


class CompactStaticLayer(TwoBuffers, StaticLayer):
    """Keys and values of one decoder layer, compacted after prefill, in tensors of fixed size.

    Attributes:
        max_cache_len: most tokens of a sequence, dropped ones too: so many columns does a mask have.
        key_buffer, value_buffer: `[B, Hkv, C, D]`; of a layer that is not compacted, `[B, Hkv, max_cache_len, D]`.
        where: int64 `[B, G, C]`, where the token of each row stands; None unless the layer is compacted.
        held: int64 `[]`, how many rows are in use.
        cumulative_length: int64 `[]`, logical length (tokens).
        prompt_length: length of the compacted prompt (tokens).
        selected_from: how many tokens were in memory at once when the layer was selected from (tokens).
    """

    _layer_type = "full_attention"
    of_samples = ("key_buffer", "value_buffer", "where")
    where: torch.Tensor = None  # type: ignore[assignment]
    held: torch.Tensor = None  # type: ignore[assignment]
    prompt_length: int = 0
    selected_from: int = 0

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        # `generate` makes a cache as long as the longest one before; what is kept here needs no such room.
        super().__init__(length_asked_of_generate(max_cache_len), **kwargs)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Return whether `generate` makes masks of fixed size outside of the model.

        Not for a prompt that zipvl compiles, whose mask is read in the graph, and not to compile the model again.
        """
        return self.is_initialized or torch.compiler.is_compiling() or not generates_for_zipvl()

    def _shown(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer if self.where is None else self._in_use(buffer)

    def _in_use(self, buffer: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # such as keys of an encoder's tokens, which nothing is added to
            return ops.kv_view(buffer, self.where, self.max_cache_len, self.max_cache_len, self.held)
        held = Held(self.positions, self.prompt_length, int(self.cumulative_length))  # type: ignore[arg-type]
        return mark(buffer[:, :, : self.cached_length].clone(), held)

    def _assigned(self, name: str, value: Any) -> Any:
        if self.where is not None:
            raise ValueError(
                f"{name}: expected those of a compacted static cache to be left alone, got others. Copy "
                "the cache as a whole with copy.deepcopy(cache), or leave cache_implementation='static' out."
            )
        return value

    @property
    def cached_length(self) -> int:
        """Return the number of tokens in memory; the device is read."""
        return int(self.held if self.where is not None else self.cumulative_length)

    @property
    def positions(self) -> torch.Tensor | None:
        """Return where the kept prompt tokens stood: int64 `[B, G, P]`; None unless the layer is compacted."""
        if self.where is None:
            return None
        return self.where[:, :, : self.cached_length - (int(self.cumulative_length) - self.prompt_length)]

    @property
    def cached_positions(self) -> torch.Tensor | None:
        """Return where each token in memory stands: int64 `[B, G, held]`, or None if the layer is empty."""
        if not self.is_initialized or self.cached_length == 0:
            return None
        if self.where is not None:
            return self.where[:, :, : self.cached_length]
        every = torch.arange(self.cached_length, device=self.key_buffer.device)
        return every.repeat(self.key_buffer.shape[0], 1, 1)

    @property
    def holds_every_token(self) -> bool:
        """Return whether no token of the prompt was dropped; the device is read."""
        return self.where is None or self.cached_length == int(self.cumulative_length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a mask is over, and where the first of them stands."""
        if query_length > 1 and not self.is_initialized and torch.compiler.is_compiling() and tracing_for_zipvl():
            return query_length, 0
        return super().get_mask_sizes(query_length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys `[B, Hkv, m, D]` and values `[B, Hkv, m, Dv]` of m new tokens; return all of them.

        Raises:
            ValueError: tensors that do not continue this cache; the cache is unchanged then.
            RuntimeError: a compacted cache is read by an attention that zipvl did not rewrite.
        """
        traced = torch.compiler.is_compiling()
        if self.where is not None:
            check_continues(self.key_buffer, self.value_buffer, key_states, value_states)
            if traced and tracing_for_zipvl():
                return self._decode(key_states, value_states)
            return self._update_outside(key_states, value_states)
        if not self.is_initialized:
            if key_states.shape[2] > self.max_cache_len:
                raise ValueError(
                    f"cache: expected a prompt of at most {self.max_cache_len} tokens, the length of this static "
                    f"cache, got {key_states.shape[2]}. Pass a greater max_cache_len, or max_new_tokens."
                )
            # Nothing is dropped of one token, such as the first of a decoder beside an encoder.
            if key_states.shape[2] > 1 and traced and tracing_for_zipvl():
                return self._prefill(key_states, value_states)
            if not traced:
                check_generate_is_compiled()
        return super().update(key_states, value_states, *args, **kwargs)

    def _prefill(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the prompt. The passes put a selection in the place of `token_positions`, which keeps every token."""
        n = k.shape[2]
        positions, room = ops.token_positions(k), self.max_cache_len - n
        self.key_buffer = ops.fixed_rows(ops.gather_tokens(k, positions, room))
        self.value_buffer = ops.fixed_rows(ops.gather_tokens(v, positions, room))
        self.where = ops.fixed_rows(ops.fixed_positions(positions, n, room))
        self.held = ops.fixed_rows(ops.row_count(positions))
        self.cumulative_length = ops.fixed_rows(torch.full((), n, dtype=torch.int64, device=k.device))
        self.batch_size, self.num_heads = k.shape[:2]
        self.k_head_dim, self.v_head_dim = k.shape[3], v.shape[3]
        self.device, self.is_initialized = k.device, True
        self.prompt_length = self.selected_from = n
        return k, v

    def _decode(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append in place; return views of logical length, which the passes rewrite to read the buffers."""
        self._append(k, v)
        n = self.max_cache_len
        where = (self.where, n, n, self.held)
        return ops.kv_view(self.key_buffer, *where), ops.kv_view(self.value_buffer, *where)

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        write_rows(self.key_buffer, self.value_buffer, k, v, self.held)
        self.held.add_(k.shape[2])
        self.cumulative_length.add_(k.shape[2])

    def _update_outside(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and give every token to attention that zipvl did not rewrite, where nothing was dropped."""
        if torch.compiler.is_compiling() or not self.holds_every_token:
            why = "It is static, and was read outside of the model that was compiled for zipvl."
            raise RuntimeError(UNREADABLE.format(why=why))
        self._append(k, v)
        return self.key_buffer[:, :, : self.max_cache_len], self.value_buffer[:, :, : self.max_cache_len]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: of a compacted layer, a positive number, or a cut through the compacted prompt; the layer is
                unchanged then.
        """
        if self.where is None:
            return super().crop(tokens_to_remove)
        n = int(self.cumulative_length) + tokens_to_remove
        if tokens_to_remove > 0 or n < self.prompt_length:
            raise ValueError(
                f"crop: expected a negative number of tokens to remove, at most the "
                f"{int(self.cumulative_length) - self.prompt_length} after the compacted prompt, got "
                f"{tokens_to_remove}. Crop less, or run the prompt again."
            )
        self.held.add_(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove)

    def reset(self) -> None:
        """Empty the layer."""
        if self.where is None:
            return super().reset()
        self.where = self.held = None  # type: ignore[assignment]
        self.key_buffer = self.value_buffer = None  # type: ignore[assignment]
        self.cumulative_length, self.prompt_length = torch.tensor(0, dtype=torch.int64), 0
        self.is_initialized = False

    def __copy__(self) -> CompactStaticLayer:
        """Return a layer with tensors of its own: they are written in place."""
        new = type(self).__new__(type(self))
        vars(new).update({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in vars(self).items()})
        return new

    def _for_batch(self, change: Any) -> None:
        super()._for_batch(change)
        if self.is_initialized:
            self.batch_size = self.key_buffer.shape[0]
