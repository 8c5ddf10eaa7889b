"""What is particular to window_attention in Triton: its tiles."""

import pytest
import torch

from zipvl_compile.kernels.sparse_attention import tilings
from zipvl_compile.kernels.window_attention_triton import window_tilings


@pytest.mark.parametrize("mask", [None, (1, 1, 1, 9), (1, 1, 9, 9)], ids=["none", "row", "full"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_are_those_of_sparse_attention_or_smaller(dtype, width, mask):
    q = torch.ones(1, 1, 9, width, dtype=dtype)
    given = (q, q, None if mask is None else torch.ones(mask))
    kept, local = window_tilings(*given)
    assert kept in tilings(*given)
    assert all(a <= min(b, most) for a, b, most in zip(local, kept, (64, 64, 4, 3), strict=True))
