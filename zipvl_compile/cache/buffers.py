"""The tensors of a compacted cache layer: rows in use, then spare rows that decoding appends to in place."""

from __future__ import annotations

import torch


def spare_tokens(n: int) -> int:
    """Return the room for decoding that a cache of `n` logical tokens gets: n / 16, from 32 to 1024 tokens.

    It depends on the logical length only, so that the layers run out of room, and grow, at the same step.
    """
    return min(max(n // 16, 32), 1024)


def with_room(buffer: torch.Tensor, used: int, room: int) -> torch.Tensor:
    """Copy the first `used` rows into a buffer with `room` more (tokens)."""
    return torch.cat([buffer[:, :, :used], buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])], 2)


def check_continues(
    key_buffer: torch.Tensor, value_buffer: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor
) -> None:
    """Check that new keys and values `[B, Hkv, m, D]` are of the batch and the model of the cached ones.

    Raises:
        ValueError: another batch size, number of heads, head_dim, or another number of keys than of values.
    """
    for name, new, old in (("key_states", key_states, key_buffer), ("value_states", value_states, value_buffer)):
        expected = (*old.shape[:2], old.shape[3])
        if (*new.shape[:2], new.shape[3]) != expected:
            raise ValueError(
                f"{name}: expected [batch, KV heads, tokens, head_dim] with batch, heads and head_dim {expected} like "
                f"the cached ones, got {tuple(new.shape)}. Continue each cache with the batch and the model that "
                "filled it."
            )
    if key_states.shape[2] != value_states.shape[2]:
        raise ValueError(
            f"value_states: expected as many tokens as key_states, {key_states.shape[2]}, got {value_states.shape[2]}."
        )
