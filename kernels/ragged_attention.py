"""sparse_attention of a padded batch, sample by sample and without the mask: each one's real kept tokens.

    sample b    rows and keys lo_b .. hi_b of its kept tokens, causally; zeros before, and padding behind sees all of it

Padding lies on one side, so what it leaves of the kept tokens of a sample is one span. A mask costs the fastest kernels
half of their speed or more, and on CPUs p^2 of memory. The host has to know the spans, so it waits for the device.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.dense_attention import dense_attention
from zipvl_compile.kernels.common.token_copies import take_rows
from zipvl_compile.kernels.sparse_attention_torch import attend_cudnn, attend_torch, empty_output


def is_ragged(mask: torch.Tensor | None, positions: torch.Tensor, is_causal: bool, softcap: float | None) -> bool:
    """Return whether a mask `[B or 1, Hq or 1, n or 1, n]` may be that of a padded batch, by its form alone."""
    row = mask is not None and mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1
    return row and is_causal and softcap is None and positions.shape[1] == 1


def spans(mask: torch.Tensor, positions: torch.Tensor) -> list[tuple[int, int]] | None:
    """Return where the kept tokens that a mask shows start and end, for each sample; None where one has a hole.

    Args:
        mask: bool `[B or 1, 1, 1, n]`.
        positions: int64 `[B, 1, P]`.
    """
    shown = mask[:, 0].expand(len(positions), -1, -1).gather(2, positions)[:, 0]  # [B, P]
    count, last = shown.sum(1), positions.shape[2] - shown.flip(1).int().argmax(1)
    first = shown.int().argmax(1)
    found = torch.stack((first, torch.where(count > 0, last, first), count), 1).tolist()
    return [(lo, hi) for lo, hi, _ in found] if all(hi - lo == size for lo, hi, size in found) else None


def attend_ragged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor,
    scale: float | None, cudnn: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attend causally among the kept tokens that the mask shows; with holes among them, by the mask.

    Args:
        q: `[B, Hq, n or P, D]`.
        k, v: `[B, Hkv, >= P, D]`, `[B, Hkv, >= P, Dv]`; with `cudnn`, finite after the first `P` rows.
        positions: int64 `[B, 1, P]`.
        mask: bool `[B or 1, 1, 1, n]`.
        scale: of the scores; None is `D ** -0.5`.
        cudnn: by `attend_cudnn`.
    """
    p = positions.shape[2]
    found = spans(mask, positions)
    if found is None:
        return attend_torch(q, k[:, :, :p], v[:, :, :p], positions, mask, True, scale, None, False)
    few = q.shape[2] == p
    out = empty_output(q, v).zero_()
    for b, (lo, hi) in enumerate(found):
        if lo == hi:
            continue
        sample = slice(b, b + 1)
        own, keys, values, kept = q[sample], k[sample, :, lo:], v[sample, :, lo:], positions[sample, :, lo:]
        own = own[:, :, lo:] if few else take_rows(own, kept, own.new_empty(1, q.shape[1], p - lo, q.shape[3]))
        size = hi - lo
        if cudnn:
            rows = attend_cudnn(own[:, :, :size], keys, values, kept[:, :, :size], scale)
        else:
            rows = dense_attention(own[:, :, :size], keys[:, :, :size], values[:, :, :size], None, True, scale, None)
        if size < p - lo:  # padding behind a sample sees all of it
            behind = dense_attention(own[:, :, size:], keys[:, :, :size], values[:, :, :size], None, False, scale, None)
            rows = torch.cat((rows, behind), 2)
        if few:
            out[sample, :, lo:] = rows
        else:
            out[sample].index_copy_(2, kept[0, 0], rows.to(out.dtype))
    return out
