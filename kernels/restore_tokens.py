"""Every prompt token in order again: the kept ones as they are, the others from host memory or from their codes.

    out[b, h, positions[b, g(h), i]] = kept[b, h, i]                                i < P
    out[b, h, other_tokens(positions, n)[b, g(h), i]] = others[b, h, i],            i < n - P
                                                        or scale * code + zero where they are codes

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
    kept: torch.Tensor, positions: torch.Tensor, others: torch.Tensor, scales: torch.Tensor | None, n: int
) -> torch.Tensor:
    if kept.dim() != 4:
        fail("restore_tokens", "kept", "a [batch, heads, tokens, head_dim] tensor", list(kept.shape), "Reshape it.")
    check_positions("restore_tokens", positions, kept.shape[0], kept.shape[1])
    p = positions.shape[2]
    if kept.shape[2] < p:
        fail("restore_tokens", "kept", f"at least {p} tokens, as positions has", kept.shape[2], "Pass the cache.")
    if n < p:
        fail("restore_tokens", "n", f"at least {p} tokens, as positions has", n, "Pass the prompt's length.")
    if scales is None and others.shape[2] < n - p:
        fail("restore_tokens", "others", f"at least {n - p} tokens", others.shape[2], "Pass those that were not kept.")
    if scales is not None:
        check_codes("restore_tokens", "others", others, scales, kept, n - p)
    out = _empty(kept, n)
    if out.numel() == 0:
        return out
    put_rows(kept[:, :, :p], positions, out)
    places = other_tokens(positions, n)
    if scales is None:
        return put_rows(others[:, :, : n - p].to(kept.device), places, out)
    for rows, (part,) in chunks((others, scales, kept.shape[3]), tokens=n - p):
        put_rows(part, places[:, :, rows], out)
    return out


def _empty(kept: torch.Tensor, n: int) -> torch.Tensor:
    return kept.new_empty(kept.shape[0], kept.shape[1], n, kept.shape[3])


@_restore_tokens.register_fake
def _(kept, positions, others, scales, n):
    return _empty(kept, n)


def restore_tokens(
    kept: torch.Tensor, positions: torch.Tensor, others: torch.Tensor, scales: torch.Tensor | None, n: int
) -> torch.Tensor:
    """Return the keys or values of every prompt token, in order.

    Args:
        kept: `[B, H, P or more, D]`, whose first P rows are the kept tokens.
        positions: int64 `[B, G, P]`, ascending, where these stand.
        others: the other tokens in order, `[B, H, n - P or more, D]` on any device, or their codes.
        scales: of codes, as `quantise_tokens` returned them; None where there are none.
        n: length of the prompt, in tokens.

    Returns:
        `[B, H, n, D]` in the dtype of `kept`; the kept rows bit for bit.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    return torch.ops.zipvl.restore_tokens(kept, positions, others, scales, n)
