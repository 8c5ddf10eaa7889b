"""A token that is not kept attends to its window and to the sinks, a layer keeps a quarter at least."""

import torch
from support.policies import N, attention_outputs, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.policies.window import POLICY


def test_rows_that_are_not_kept_are_those_of_a_window():
    """With a window as long as the prompt they are those of the dense model, as the kept ones are not."""
    zero, kept = attention_outputs("window", tau=0.6, unselected="zero")
    near, same = attention_outputs("window", tau=0.6, window=N)
    dense, _ = attention_outputs("window", tau=1.0)
    assert torch.equal(kept, same)
    others = torch.ones(N, dtype=torch.bool).scatter_(0, kept, False)
    assert zero[others].abs().max() == 0
    torch.testing.assert_close(near[others], dense[others], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(near[kept], zero[kept], atol=1e-5, rtol=1e-4)
    far, _ = attention_outputs("window", tau=0.6)
    torch.testing.assert_close(far[others & (torch.arange(N) < 64)], dense[others & (torch.arange(N) < 64)],
                               atol=1e-5, rtol=1e-4)  # fmt: skip
    assert not torch.allclose(far[others], dense[others], atol=1e-4)


def test_no_layer_starves():
    _, kept = run("window", tau=1e-6)
    assert [positions.shape[2] for positions in kept] == [25] * 4
    assert (POLICY.floor, POLICY.window, POLICY.sinks, POLICY.kept_window) == (0.25, 64, 4, False)
