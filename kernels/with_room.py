"""A buffer with spare room for what needs no gather: the kept tokens alone, or all of them.

    out[b, h, i] = x[b, h, i]        for i < P;  0 in the `spare` rows after that

It copies what was computed for the kept tokens only, and everything where a layer keeps every token. It becomes
PyTorch's own operations when a graph is compiled, so that Inductor fuses it with what comes before.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import fail

torch.library.define("zipvl::with_room", "(Tensor x, SymInt spare) -> Tensor")


@torch.library.impl("zipvl::with_room", "CompositeImplicitAutograd")
def _with_room(x: torch.Tensor, spare: int) -> torch.Tensor:
    if x.dim() != 4:
        fail("with_room", "x", "a [batch, heads, tokens, head_dim] tensor", list(x.shape), "Reshape it.")
    return torch.cat([x, x.new_zeros(x.shape[0], x.shape[1], spare, x.shape[3])], 2)


def with_room(x: torch.Tensor, spare: int) -> torch.Tensor:
    """Copy keys or values of the kept tokens into a buffer with spare room.

    Args:
        x: `[B, H, P, D]`.
        spare: rows of zeros after the kept ones, in tokens.

    Returns:
        `[B, H, P + spare, D]`, same dtype.

    Raises:
        ValueError: x of another rank.
    """
    return torch.ops.zipvl.with_room(x, spare)
