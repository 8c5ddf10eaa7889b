"""The prompt tokens that were not kept.

    o_i = i + |{k : T_k - k <= i}|      the i-th number of 0 .. n - 1 outside T

T_k - k of them stand before T_k, so a search in that ascending list finds each without a table of n bits.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import fail


def _shape(positions: torch.Tensor, n: int) -> tuple[int, ...]:
    return (*positions.shape[:2], n - positions.shape[2])


@torch.library.custom_op("zipvl::other_tokens", mutates_args=())
def _other_tokens(positions: torch.Tensor, n: int) -> torch.Tensor:
    if positions.dim() != 3 or positions.dtype != torch.int64:
        got = f"{positions.dtype} {list(positions.shape)}"
        fail("other_tokens", "positions", "an int64 [batch, groups, kept] tensor", got,
             "Pass what select_tokens returned.")  # fmt: skip
    kept = positions.shape[2]
    if kept > n:
        fail("other_tokens", "positions", f"at most {n} kept tokens, the prompt", kept, "Pass the prompt's length.")
    before = positions - torch.arange(kept, device=positions.device)
    each = torch.arange(n - kept, device=positions.device).expand(_shape(positions, n)).contiguous()
    return each + torch.searchsorted(before, each, right=True)


@_other_tokens.register_fake
def _(positions, n):
    return positions.new_empty(_shape(positions, n))


def other_tokens(positions: torch.Tensor, n: int) -> torch.Tensor:
    """Return the prompt tokens outside `positions`, ascending.

    Args:
        positions: int64 `[B, G, P]` of the kept tokens, ascending, each in [0, n).
        n: length of the prompt, in tokens.

    Returns:
        int64 `[B, G, n - P]`.

    Raises:
        ValueError: positions of another rank or dtype, or more than n of them.
    """
    return torch.ops.zipvl.other_tokens(positions, n)
