"""The buffers of a compacted layer: how much room they get, and what does not fit them."""

from __future__ import annotations

import pytest
import torch

from zipvl_compile.cache.buffers import check_continues, spare_tokens, with_room


@pytest.mark.parametrize("n, spare", [(1, 32), (512, 32), (1600, 100), (10**6, 1024)])
def test_the_room_for_decoding_is_a_sixteenth_within_bounds(n, spare):
    assert spare_tokens(n) == spare


def test_a_buffer_with_room_is_a_copy_of_the_rows_in_use():
    buffer = torch.randn(2, 3, 8, 4)
    grown = with_room(buffer, 5, 7)
    assert grown.shape == (2, 3, 12, 4) and torch.equal(grown[:, :, :5], buffer[:, :, :5])
    assert grown.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()


GOOD = (2, 3, 1, 4)


@pytest.mark.parametrize(
    "k, v, message",
    [
        ((1, 3, 1, 4), GOOD, r"key_states: .*\(2, 3, 4\).*got \(1, 3, 1, 4\)"),
        (GOOD, (2, 3, 1, 5), r"value_states: .*got \(2, 3, 1, 5\)"),
        (GOOD, (2, 3, 2, 4), "value_states: expected as many tokens as key_states, 1, got 2"),
    ],
)
def test_what_does_not_continue_a_cache_is_named(k, v, message):
    buffers = [torch.zeros(2, 3, 8, 4) for _ in "kv"]
    check_continues(*buffers, torch.zeros(GOOD), torch.zeros(GOOD))
    with pytest.raises(ValueError, match=message):
        check_continues(*buffers, torch.zeros(k), torch.zeros(v))
