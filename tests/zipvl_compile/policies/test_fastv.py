"""Two layers keep every token; the third chooses by its newest row, for all that follow."""

import torch
from support import paper
from support.policies import N, attention_of, dense, run
from support.quiet import one_thread_without_gradients  # noqa: F401

import zipvl_compile
from zipvl_compile.policies.fastv import POLICY


def test_the_third_layer_chooses_for_all_that_follow():
    out, kept = run("fastv", keep_ratio=0.3)
    assert [positions.shape[2] for positions in kept] == [N, N, 30, 30]
    assert torch.equal(kept[2], kept[3])
    scores = attention_of(2, dense().hidden_states[2], torch.tensor([N - 1]))
    assert kept[2].tolist() == paper.selection(*scores, keep_ratio=0.3, ranking=scores[0]).tolist()
    assert (POLICY.dense_layers, POLICY.score_every, POLICY.keep_ratio) == (2, 0, 0.5)
    assert zipvl_compile.kept_tokens(out) is not None
