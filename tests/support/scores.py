"""Accumulated scores to select from, and rules to select by."""

import torch

from zipvl_compile.kernels.select_tokens import select_tokens

RULES = ({"tau": 0.5, "keep_recent": 5}, {"tau": 0.975}, {"keep_ratio": 0.3}, {"keep_ratio": 1e-6, "keep_recent": 3})


def drawn(n, batch=2, groups=1, seed=0, levels=0):
    """Return skewed scores with some tokens that nobody sees; `levels` makes ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, groups, n, generator=generator) ** 6
    seen = torch.randint(0, 5, (batch, n), generator=generator).float()
    x = x * (seen > 0).unsqueeze(1)
    return ((x * levels).round() / levels if levels else x), seen


def same(implementation, accumulated, visible, **options):
    """Assert that a kernel selects what sorting selects; return it."""
    got = implementation.run(select_tokens, accumulated, visible, **options)
    assert torch.equal(got, select_tokens(accumulated, visible, **options | {"kernel": "torch"}))
    return got
