"""What every compacted cache layer does with its keys and values: hand them out, move them, choose samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


class TwoBuffers(CacheLayerMixin):
    """Keys and values in two buffers, with other tensors `of_samples` that have a row for each sample, too.

    A layer says what it hands out of a buffer (`_shown`), and what it stores of what is assigned (`_assigned`).
    """

    of_samples: tuple[str, ...] = ("key_buffer", "value_buffer")
    key_buffer: torch.Tensor = None  # type: ignore[assignment]
    value_buffer: torch.Tensor = None  # type: ignore[assignment]
    device: Any
    is_initialized: bool

    # transformers reads and assigns `keys` and `values`; they are the rows of the buffers that are in use.
    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """Return the cached keys `[B, Hkv, cached_length, D]`: kept prompt tokens, then every later token.

        Where tokens were dropped this is a `KeptTensor`, which knows it.
        """
        return self._shown(self.key_buffer)

    @keys.setter
    def keys(self, value: torch.Tensor) -> None:
        self.key_buffer = self._assigned("keys", value)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """Return the cached values `[B, Hkv, cached_length, Dv]`, as `keys`."""
        return self._shown(self.value_buffer)

    @values.setter
    def values(self, value: torch.Tensor) -> None:
        self.value_buffer = self._assigned("values", value)

    def _shown(self, buffer: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _assigned(self, name: str, value: Any) -> Any:
        raise NotImplementedError

    @property
    def moving(self) -> tuple[str, ...]:
        """Return the names of the tensors that are moved to the CPU and back."""
        return ("key_buffer", "value_buffer")

    def offload(self) -> None:
        """Move the buffers to the CPU, with their spare rows."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move the buffers back to the device of the layer."""
        if self.is_initialized and self.key_buffer.device != self.device:
            self._move(self.device)

    def _move(self, device: Any) -> None:
        if self.is_initialized:
            for name in self.moving:
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select samples by `beam_idx`, for beam search."""
        self._for_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times."""
        self._for_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the samples at `indices`."""
        self._for_batch(lambda x: x[_on(x, indices), ...])

    def _for_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.get_seq_length() > 0:
            for name in self.of_samples:
                tensor = getattr(self, name)
                setattr(self, name, None if tensor is None else change(tensor))


def _on(x: torch.Tensor, indices: Any) -> Any:
    """Return indices on the device of a tensor; some of a layer's may lie in host memory."""
    return indices.to(x.device) if isinstance(indices, torch.Tensor) else indices
