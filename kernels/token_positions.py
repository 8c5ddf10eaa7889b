"""The positions of every token, the marker that a pass replaces by a selection, and those of all cached tokens.

    out[b, 0, i] = i

A cache layer traces it beside its keys and values, so that the graph returns positions. It becomes PyTorch's own
operations when a graph is compiled, so that Inductor fuses it with what comes before.
"""

from __future__ import annotations

import torch

torch.library.define("zipvl::token_positions", "(Tensor k) -> Tensor")


@torch.library.impl("zipvl::token_positions", "CompositeImplicitAutograd")
def _token_positions(k: torch.Tensor) -> torch.Tensor:
    return torch.arange(k.shape[2], device=k.device).repeat(k.shape[0], 1, 1)


def token_positions(k: torch.Tensor) -> torch.Tensor:
    """Return the positions of every token of `k [B, Hkv, n, D]`: int64 `[B, 1, n]`, 0 to n - 1."""
    return torch.ops.zipvl.token_positions(k)


def cached_count(positions: torch.Tensor, prompt_length: int, n: int) -> int:
    """Return how many tokens are in memory: the kept ones `[B, G, P]` of a prompt, and every later one of n in all."""
    # Not `P + n - prompt_length`: PyTorch 2.13 takes an n that is a sum of symbols, known to be constant, for 0 there.
    return n - (prompt_length - positions.shape[2])


def cached_positions(positions: torch.Tensor, prompt_length: int, n: int) -> torch.Tensor:
    """Return where every cached token stands in the sequence.

    Args:
        positions: int64 `[B, G, P]` of the kept prompt tokens.
        prompt_length: in tokens.
        n: logical length in tokens.

    Returns:
        int64 `[B, G, P + n - prompt_length]`, ascending.
    """
    # Not a `cat` with the later ones: of those there is one at first, and a size of one is compiled apart from others.
    kept = positions.shape[2]
    row = torch.arange(cached_count(positions, prompt_length, n), device=positions.device)
    row = row.expand(*positions.shape[:2], -1)
    one_more = torch.cat([positions, positions.new_zeros(*positions.shape[:2], 1)], 2)  # a crop may leave none
    return torch.where(row < kept, one_more.gather(2, row.clamp(max=kept)), row + (prompt_length - kept))
