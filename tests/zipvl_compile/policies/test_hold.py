"""A token that is not kept holds the attention output of the kept one before it."""

import torch
from support.policies import N, attention_outputs
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.policies.hold import POLICY


def test_rows_between_kept_ones_get_the_attention_of_the_last():
    added, kept = attention_outputs("hold", tau=0.6)
    assert kept[0] == 0 and len(kept) < N
    before = torch.searchsorted(kept, torch.arange(N), right=True) - 1
    torch.testing.assert_close(added, added[kept[before]], atol=1e-5, rtol=1e-4)
    assert added.abs().amax(1).min() > 0 and POLICY.unselected == "hold"
