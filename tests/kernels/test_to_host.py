"""Tokens that go to the host, and where they come from; test_restore_tokens.py puts them back."""

import pytest
import torch

from zipvl_compile.kernels.to_host import to_host


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [0, 3])
def test_the_tokens_of_each_head(groups, count):
    x = torch.randn(2, 4, 7, 5)
    others = torch.rand(2, groups, 7).argsort(-1)[:, :, :count].sort(-1).values
    moved = to_host(x, others)
    assert moved.device.type == "cpu" and moved.shape == (2, 4, count, 5)
    for b in range(2):
        for h in range(4):
            assert torch.equal(moved[b, h], x[b, h, others[b, h * groups // 4]])


def test_positions_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="to_host"):
        to_host(torch.zeros(1, 2, 3, 4), torch.zeros(2, 1, 1, dtype=torch.int64))
