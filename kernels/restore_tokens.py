"""Every prompt token in order again: the kept ones as they are, the others from their codes.

    out[b, h, positions[b, g(h), i]] = kept[b, h, i]            i < P
    out[b, h, others[b, g(h), i]] = scale * code + zero         i < n - P,  others = other_tokens(positions, n)

This is what a full cache would hold, for attention that reads it as one.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import check_positions, fail
from zipvl_compile.kernels.common.codes import check_codes, chunks
from zipvl_compile.kernels.common.token_copies import put_rows
from zipvl_compile.kernels.other_tokens import other_tokens


@torch.library.custom_op("zipvl::restore_tokens", mutates_args=())
def _restore_tokens(
    kept: torch.Tensor, positions: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, n: int
) -> torch.Tensor:
    if kept.dim() != 4:
        fail("restore_tokens", "kept", "a [batch, heads, tokens, head_dim] tensor", list(kept.shape), "Reshape it.")
    check_positions("restore_tokens", positions, kept.shape[0], kept.shape[1])
    p = positions.shape[2]
    if kept.shape[2] < p:
        fail("restore_tokens", "kept", f"at least {p} tokens, as positions has", kept.shape[2], "Pass the cache.")
    if n < p:
        fail("restore_tokens", "n", f"at least {p} tokens, as positions has", n, "Pass the prompt's length.")
    check_codes("restore_tokens", "codes", codes, scales, kept, n - p)
    out = _empty(kept, n)
    if out.numel():
        put_rows(kept[:, :, :p], positions, out)
        others = other_tokens(positions, n)
        for rows, (part,) in chunks((codes, scales, kept.shape[3]), tokens=n - p):
            put_rows(part, others[:, :, rows], out)
    return out


def _empty(kept: torch.Tensor, n: int) -> torch.Tensor:
    return kept.new_empty(kept.shape[0], kept.shape[1], n, kept.shape[3])


@_restore_tokens.register_fake
def _(kept, positions, codes, scales, n):
    return _empty(kept, n)


def restore_tokens(
    kept: torch.Tensor, positions: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, n: int
) -> torch.Tensor:
    """Return the keys or values of every prompt token, in order.

    Args:
        kept: `[B, H, P or more, D]`, whose first P rows are the kept tokens.
        positions: int64 `[B, G, P]`, ascending, where these stand.
        codes, scales: of the others, as `quantise_tokens` returned them.
        n: length of the prompt, in tokens.

    Returns:
        `[B, H, n, D]` in the dtype of `kept`; the kept rows bit for bit.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    return torch.ops.zipvl.restore_tokens(kept, positions, codes, scales, n)
