"""The KV cache layer: a logical length for Hugging Face, the kept tokens in memory.

Defining `CompactLayer` registers it with transformers, so that every `DynamicCache(config=...)` uses it for its
full-attention layers, also the caches that `generate` and `forward` make. Until a prompt runs through a model that is
compiled for zipvl it is transformers' `DynamicLayer`: the same methods over the same two tensors, which alone say what
it holds. A compacted layer keeps kept tokens with spare rows behind them, to which decoding appends in place.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from zipvl_compile.cache.buffers import check_continues, spare_tokens, with_room
from zipvl_compile.cache.eager_fallback import check_generate_is_compiled, read_in_eager, warn_of_eager_decode
from zipvl_compile.cache.evicted import EVICTED, cut_others, forget_others, recalled, store_others
from zipvl_compile.cache.kept_tensor import REBUILT, Held, KeptTensor, held_by, mark, plain
from zipvl_compile.cache.later_parts import compact_again, continued
from zipvl_compile.cache.two_buffers import TwoBuffers
from zipvl_compile.gradients import tracing_for_zipvl
from zipvl_compile.kernels.kv_view import UNREADABLE
from zipvl_compile.kernels.ops import ops
from zipvl_compile.kernels.token_positions import cached_positions
from zipvl_compile.passes.match.attention_site import PART_TOKENS
from zipvl_compile.traced_options import reselect_every, reselect_tokens


class CompactLayer(TwoBuffers, DynamicLayer):
    """Keys and values of one decoder layer, compacted after prefill.

    Attributes:
        key_buffer, value_buffer: `[B, Hkv, capacity, D]`, or None before the first update. In a compacted layer they
            hold the kept prompt tokens, then every later token, then spare rows; else every token and no more.
        positions: int64 `[B, G, P]`, where the kept prompt tokens stood; None unless the layer is compacted.
        prompt_length: length of the compacted prompt (tokens).
        selected_from: how many tokens were in memory at once when the layer was last selected from (tokens).
        cumulative_length: logical length of a compacted layer (tokens); 0 otherwise, where `keys` says it.
        other_keys, other_values, key_scales, value_scales: the other tokens of the prompt, where the options `evict`
            keep them: in host memory, or as codes with their scales; else None.
        queries: `[B, Hq, R, D]`, of the newest tokens, where the option `reselect_every` asks for them; else None.
        borrowed: whether others hold the rows of the buffers, too: they are copied before anything is written.
        lent: whether a view of the rows in use was handed out: what `crop` frees must not be written over.
    """

    _layer_type = "full_attention"
    of_samples = ("key_buffer", "value_buffer", "positions", "queries", *EVICTED)
    positions: torch.Tensor = None  # type: ignore[assignment]
    prompt_length: int = 0
    cumulative_length: int = 0
    selected_from: int = 0
    other_keys = other_values = key_scales = value_scales = queries = None
    borrowed: bool = False
    lent: bool = False

    def _shown(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer if self.positions is None else self._in_use(buffer)

    def _in_use(self, buffer: torch.Tensor) -> torch.Tensor:
        rows = buffer[:, :, : self.cached_length]
        if torch.compiler.is_compiling():
            return rows
        self.lent = True
        return rows if self.holds_every_token else mark(rows, self._held())

    def _held(self) -> Held:
        return Held(self.positions, self.prompt_length, self.cumulative_length, self.other_keys is not None)

    def _assigned(self, name: str, value: Any) -> Any:
        """Prepare a compacted layer for other keys or values, and return them as a layer stores them.

        Raises:
            ValueError: tokens were dropped, and it cannot be told which ones the new tensor is of.
        """
        if self.positions is None:
            return value
        if value is None or self.holds_every_token:
            self._forget_prompt()
            return value
        if not isinstance(value, KeptTensor) or value.held is None or not self._is_of(value.held):
            raise ValueError(
                REBUILT.format(name=name, what=f" ({self.positions.shape[2]} of {self.prompt_length} of its prompt)")
            )
        self._only_in_use()
        return plain(value)

    def _is_of(self, held: Held) -> bool:
        return (held.prompt_length, held.n) == (self.prompt_length, self.cumulative_length) and (
            held.positions is self.positions or torch.equal(held.positions, self.positions)
        )

    def _forget_prompt(self) -> None:
        """Become a layer of plain keys and values."""
        self._only_in_use()
        self.positions, self.prompt_length, self.cumulative_length = None, 0, 0  # type: ignore[assignment]
        self.borrowed, self.queries = False, None
        forget_others(self)

    def _only_in_use(self) -> None:
        """Give up the spare rows: the buffers may be replaced one by one, and by tensors of other owners."""
        used = self.cached_length
        self.key_buffer, self.value_buffer = self.key_buffer[:, :, :used], self.value_buffer[:, :, :used]
        self.borrowed = True

    @property
    def moving(self) -> tuple[str, ...]:
        """Return the names of the tensors that are moved to the CPU and back; codes are read with the buffers."""
        return super().moving + (EVICTED if self.key_scales is not None else ())

    @property
    def holds_every_token(self) -> bool:
        """Return whether no token of the prompt was dropped."""
        return self.positions is None or self.positions.shape[2] == self.prompt_length

    @property
    def cached_length(self) -> int:
        """Return the number of tokens in memory."""
        if self.positions is None:
            return DynamicLayer.get_seq_length(self)
        return self.cumulative_length - (self.prompt_length - self.positions.shape[2])

    @property
    def cached_positions(self) -> torch.Tensor | None:
        """Return where each cached token stands in the sequence: int64 `[B, G, cached_length]`, or None if empty."""
        if self.get_seq_length() == 0:
            return None
        if self.positions is None:
            every = torch.arange(self.key_buffer.shape[2], device=self.key_buffer.device)
            return every.repeat(self.key_buffer.shape[0], 1, 1)
        return cached_positions(self.positions, self.prompt_length, self.cumulative_length)

    def get_seq_length(self) -> int:
        """Return the logical length in tokens: masks, position ids and M-RoPE count dropped tokens too."""
        return DynamicLayer.get_seq_length(self) if self.positions is None else self.cumulative_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys `[B, Hkv, m, D]` and values `[B, Hkv, m, Dv]` of m new tokens; return all of them.

        Raises:
            ValueError: tensors that do not continue this cache; the cache is unchanged then.
            RuntimeError: a compacted cache is read by an attention that zipvl did not rewrite.
        """
        traced = torch.compiler.is_compiling()
        if self.positions is not None:
            check_continues(self.key_buffer, self.value_buffer, key_states, value_states)
            if traced and tracing_for_zipvl():
                return self._continue(key_states, value_states)
            return self._update_outside(key_states, value_states)
        if self.get_seq_length() > 0:
            if traced and tracing_for_zipvl() and key_states.shape[2] >= PART_TOKENS:
                return self._prefill(*continued(self, key_states, value_states))
            return super().update(key_states, value_states, *args, **kwargs)
        if traced and tracing_for_zipvl():
            return self._prefill(key_states, value_states)
        if not traced:
            if isinstance(key_states, KeptTensor) or isinstance(value_states, KeptTensor):
                return self._rebuild(key_states, value_states)
            check_generate_is_compiled()
        return super().update(key_states, value_states, *args, **kwargs)

    def _prefill(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the prompt. The passes put a selection in the place of `token_positions`, which keeps every token."""
        n = k.shape[2]
        spare = spare_tokens(n)
        self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
        self.positions = ops.token_positions(k)
        self.key_buffer = ops.gather_tokens(k, self.positions, spare)
        self.value_buffer = ops.gather_tokens(v, self.positions, spare)
        store_others(self, k, v)
        if reselect_every():
            self.queries = ops.room_for_queries(k, reselect_every())
        self.prompt_length = self.cumulative_length = self.selected_from = n
        return k, v

    def _continue(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens to a compacted layer, and select anew what is in memory, where that is due."""
        m, every = k.shape[2], reselect_every()
        if self.other_keys is not None and m >= PART_TOKENS and 0 < reselect_tokens() <= m:
            keys, values = recalled(self)
            return self._prefill(torch.cat([keys, k], 2), torch.cat([values, v], 2))
        views = self._decode(k, v)
        since = self.cumulative_length - self.prompt_length
        if m >= PART_TOKENS and self.other_keys is None:
            compact_again(self)
        elif every and self.queries is not None:
            ops.note_queries(self.queries, self.key_buffer, since - m)
            # Draft tokens may have to be taken back, which a selection does not allow.
            if m == 1 and since >= every:
                compact_again(self)
        return views

    def _decode(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append in place; return views of logical length, which the passes rewrite to read the buffers."""
        self._append(k, v)
        where = (self.positions, self.prompt_length, self.cumulative_length)
        if self.key_scales is None:
            return ops.kv_view(self.key_buffer, *where), ops.kv_view(self.value_buffer, *where)
        return (
            ops.kv_view(self.key_buffer, *where, codes=self.other_keys, scales=self.key_scales),
            ops.kv_view(self.value_buffer, *where, codes=self.other_values, scales=self.value_scales),
        )

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        at, m = self.cached_length, k.shape[2]
        if self.borrowed or at + m > self.key_buffer.shape[2]:
            room = m + spare_tokens(self.cumulative_length)
            self.key_buffer = with_room(self.key_buffer, at, room)
            self.value_buffer = with_room(self.value_buffer, at, room)
            if self.borrowed:  # a new attribute would be one more guard to fail
                self.borrowed = False
                self.queries = None if self.queries is None else self.queries.clone()
        ops.append_tokens(self.key_buffer, self.value_buffer, k, v, at)
        self.cumulative_length = self.cumulative_length + m

    def _update_outside(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and give the physical tokens to attention that zipvl did not rewrite, where that is right.

        One new token sees every cached token, so the physical keys alone give the right answer. More tokens, or a
        padding mask, need masks of physical length, which the model does not make. Codes are read as numbers again.
        """
        if self.key_scales is not None:
            self._append(k, v)
            return recalled(self)
        if not self.holds_every_token and k.shape[2] != 1:
            raise RuntimeError(UNREADABLE.format(why=f"{k.shape[2]} new tokens came outside the compiled model."))
        self._append(k, v)
        used = self.cached_length
        keys, values = self.key_buffer[:, :, :used], self.value_buffer[:, :, :used]
        if self.holds_every_token or torch.compiler.is_compiling():
            return keys, values
        warn_of_eager_decode()
        return read_in_eager(keys), values

    def _rebuild(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Become the compacted layer that a pair of keys and values left."""
        held = held_by(k, v)
        if held.elsewhere:
            raise ValueError(REBUILT.format(name="key_states", what=", and the others apart from them"))
        self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
        self.key_buffer, self.value_buffer = plain(k), plain(v)
        self.positions, self.prompt_length = held.positions.to(k.device), held.prompt_length
        self.cumulative_length, self.borrowed = held.n, True
        return k, v

    def __copy__(self) -> CompactLayer:
        """Return a layer that shares these tensors until either of them grows, as with transformers' layers."""
        self.borrowed = self.positions is not None
        new = type(self).__new__(type(self))
        vars(new).update(vars(self))
        return new

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.key_buffer = self.value_buffer = self.positions = None  # type: ignore[assignment]
        self.prompt_length = self.cumulative_length = self.selected_from = 0
        self.is_initialized = self.borrowed = self.lent = False
        self.queries = None
        forget_others(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number; or, of a compacted layer, more tokens than there are, or a cut through the
                compacted prompt of a batch of several samples; the layer is unchanged then.
        """
        if self.positions is None:
            return super().crop(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected a negative number of tokens to remove, got {tokens_to_remove}. Negate it."
            )
        n = self.cumulative_length + int(tokens_to_remove)  # assisted decoding counts in a tensor in older releases
        if n < 0:
            raise ValueError(
                f"crop: expected at most {self.cumulative_length} tokens to remove, got {-tokens_to_remove}. "
                "Use reset() to empty the cache."
            )
        if n < self.prompt_length:
            # Samples and heads keep different tokens, and a cache is cropped layer by layer: refuse before the first is
            # changed.
            if self.positions[:, :, 0].numel() > 1 and not self.holds_every_token:
                raise ValueError(
                    f"crop: expected a cut after the {self.prompt_length} compacted prompt tokens of a batch of "
                    f"{self.positions.shape[0]} with {self.positions.shape[1]} selections each, got one at {n}. Crop "
                    "less, crop samples one by one (batch_select_indices), or run the prompt again."
                )
            self.positions = self.positions[:, :, : int((self.positions[0, 0] < n).sum())]
            self.prompt_length = n
            cut_others(self)
        self.cumulative_length = n
        self.borrowed = self.borrowed or self.lent
