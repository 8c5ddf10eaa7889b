"""Tokens that go to the host come back in their places."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl_compile.kernels.other_tokens import other_tokens
from zipvl_compile.kernels.to_host import to_host, with_others


@given(
    batch=st.integers(1, 2), groups=st.sampled_from([1, 2]), n=st.integers(0, 20), share=st.floats(0, 1),
    spare=st.integers(0, 3),
)  # fmt: skip
def test_there_and_back(batch, groups, n, share, spare):
    x = torch.randn(batch, 4, n, 5)
    count = round(share * n)
    positions = torch.rand(batch, groups, n).argsort(-1)[:, :, :count].sort(-1).values
    rows = positions.repeat_interleave(4 // groups, 1)[..., None].expand(-1, -1, -1, 5)
    kept = torch.cat([x.gather(2, rows), torch.full((batch, 4, spare, 5), torch.nan)], 2)
    others = to_host(x, other_tokens(positions, n))
    assert others.device.type == "cpu" and others.shape[2] == n - count
    assert torch.equal(with_others(kept, positions, others, n), x)


def test_what_is_missing_is_named():
    kept, positions = torch.zeros(1, 2, 3, 4), torch.tensor([[[0, 2, 4]]])
    with pytest.raises(ValueError, match="with_others: kept, others: expected at least 3 and 5 tokens, got 3 and 4"):
        with_others(kept, positions, torch.zeros(1, 2, 4, 4), 8)
    with pytest.raises(ValueError, match="to_host"):
        to_host(kept, torch.zeros(2, 1, 1, dtype=torch.int64))
