"""A buffer with room: the kept rows are copied, the rest is there to write into."""

import pytest
import torch

from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.with_room import with_room


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("kept", [0, 1, 5])
def test_it_holds_what_gather_tokens_holds(kept, spare):
    x = torch.randn(2, 3, 7, 4)
    positions = torch.arange(kept).repeat(2, 1, 1)
    gathered = gather_tokens(x, positions, spare)
    buffer = with_room(x[:, :, :kept], spare)
    assert buffer.shape == gathered.shape and buffer.is_contiguous()
    assert torch.equal(buffer, gathered)
    assert buffer.data_ptr() != x.data_ptr() or not kept


def test_another_rank_is_refused():
    with pytest.raises(ValueError, match="with_room: x: expected a"):
        with_room(torch.zeros(2, 3, 4), 1)
