"""What the newest rows look at, smoothed, and those rows themselves; after a dense prefill."""

import numpy as np
import torch
from support import paper
from support.policies import N, attention_of, dense, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.policies.snapkv import POLICY


def test_the_window_and_what_it_looks_at():
    out, kept = run("snapkv", keep_tokens=20)
    whole = dense()
    torch.testing.assert_close(out.logits, whole.logits, atol=1e-4, rtol=1e-4)
    for layer, positions in enumerate(kept):
        accumulated, visible = attention_of(layer, whole.hidden_states[layer], torch.arange(N - 64, N))
        padded = np.pad(accumulated, ((0, 0), (0, 0), (2, 2)))
        smooth = sum(padded[..., i : i + N] for i in range(5)) / 5
        expected = paper.selection(accumulated, visible, keep_tokens=20, keep_recent=64, ranking=smooth)
        assert positions.tolist() == expected.tolist()
        assert set(range(N - 64, N)) <= set(positions.flatten().tolist())
    assert (POLICY.pooling, POLICY.keep_recent) == (5, 64)
