"""A padding mask only where it hides something.

    out = mask    if it hides any key;  mask[:0] else

Attention without a mask has the fastest kernels, and the padding mask of most prompts hides nothing. What reads the
result takes a mask of 0 samples as none.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("zipvl::hiding_rows", mutates_args=())
def _hiding_rows(mask: torch.Tensor) -> torch.Tensor:
    hides = mask.numel() > 0 and not bool(mask.all())  # the host waits for the device
    return mask.clone() if hides else mask.new_empty(0, *mask.shape[1:])


@_hiding_rows.register_fake
def _(mask):
    return mask.new_empty(torch.library.get_ctx().new_dynamic_size(), *mask.shape[1:])


def hiding_rows(mask: torch.Tensor) -> torch.Tensor:
    """Return a copy of a bool `mask [B, ...]` (True = visible), or one of 0 samples if it hides nothing."""
    return torch.ops.zipvl.hiding_rows(mask)
