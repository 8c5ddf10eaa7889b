"""The largest sums of attention over every row, and the newest tokens; after a dense prefill."""

import torch
from support import paper
from support.policies import N, attention_of, dense, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.policies.heavy_hitters import POLICY


def test_sums_over_every_row():
    out, kept = run("heavy_hitters", keep_ratio=0.2)
    whole = dense()
    torch.testing.assert_close(out.logits, whole.logits, atol=1e-4, rtol=1e-4)
    for layer, positions in enumerate(kept):
        accumulated, visible = attention_of(layer, whole.hidden_states[layer], torch.arange(N))
        options = {"keep_ratio": 0.2, "keep_recent": 16}
        expected = paper.selection(accumulated, visible, ranking=accumulated, **options)
        assert positions.tolist() == expected.tolist() and positions.shape[2] == 35
        usual = paper.selection(accumulated, visible, **options)
        assert positions.tolist() != usual.tolist(), "sums must matter in this case"
    assert POLICY.prefill == "dense"
