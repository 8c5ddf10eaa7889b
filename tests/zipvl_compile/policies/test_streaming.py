"""The first tokens and the newest, after a dense prefill."""

import torch
from support.policies import N, dense, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.policies.streaming import POLICY


def test_sinks_and_the_newest_after_a_dense_prefill():
    out, kept = run("streaming", keep_ratio=0.2)
    expected = [0, 1, 2, 3, *range(N - 20, N)]
    assert [positions.flatten().tolist() for positions in kept] == [expected] * 4
    torch.testing.assert_close(out.logits, dense().logits, atol=1e-4, rtol=1e-4)
    assert POLICY.prefill == "dense"
