"""token_positions: where every token stands, in memory of its own."""

import pytest
import torch

from zipvl_compile.kernels.token_positions import token_positions


@pytest.mark.parametrize("n", [0, 1, 5])
def test_token_positions_names_every_token(n):
    positions = token_positions(torch.ones(3, 2, n, 4, dtype=torch.bfloat16))
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[list(range(n))]] * 3
    assert positions.numel() == 0 or positions.untyped_storage().nbytes() == 3 * n * 8, "real memory, not an expand"
