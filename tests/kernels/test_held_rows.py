"""held_rows: the kept token before each one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl_compile.kernels.held_rows import held_rows


@pytest.mark.parametrize(("kept", "held"), [([0, 2, 3], [0, 0, 1, 2, 2]), ([2], [0] * 5), ([1, 4], [0, 0, 0, 0, 1])])
def test_by_hand(kept, held):
    assert held_rows(torch.tensor([[kept]]), 5).tolist() == [[held]]


@given(n=st.integers(1, 60), seed=st.integers(0, 99), groups=st.integers(1, 3))
def test_any_positions(n, seed, groups):
    generator = torch.Generator().manual_seed(seed)
    p = int(torch.randint(1, n + 1, (1,), generator=generator))
    kept = torch.stack([torch.randperm(n, generator=generator)[:p].sort().values for _ in range(2 * groups)])
    found = held_rows(kept.view(2, groups, p), n).view(2 * groups, n)
    for positions, indices in zip(kept.tolist(), found.tolist(), strict=True):
        for j, index in enumerate(indices):
            before = [i for i, position in enumerate(positions) if position <= j]
            assert index == (before[-1] if before else 0)
