"""token_positions: where every token stands, in memory of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl_compile.kernels.token_positions import cached_count, cached_positions, token_positions


@pytest.mark.parametrize("n", [0, 1, 5])
def test_token_positions_names_every_token(n):
    positions = token_positions(torch.ones(3, 2, n, 4, dtype=torch.bfloat16))
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[list(range(n))]] * 3
    assert positions.numel() == 0 or positions.untyped_storage().nbytes() == 3 * n * 8, "real memory, not an expand"


@given(n=st.integers(1, 12), count=st.integers(0, 12), later=st.integers(0, 5))
def test_where_everything_in_memory_stands(n, count, later):
    positions = torch.rand(2, 3, n).argsort(-1)[:, :, : min(count, n)].sort(-1).values
    expected = torch.cat([positions, torch.arange(n, n + later).expand(2, 3, -1)], 2)
    assert torch.equal(cached_positions(positions, n, n + later), expected)
    assert cached_count(positions, n, n + later) == expected.shape[2]
