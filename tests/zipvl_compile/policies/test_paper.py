"""The paper: fewest tokens that reach tau, and nothing for the others."""

from support import paper
from support.policies import N, attention_of, paper_rows, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.policies.paper import POLICY


def test_the_first_layer_keeps_what_the_formula_says():
    out, kept = run("paper", tau=0.8)
    expected = paper.selection(*attention_of(0, out.hidden_states[0], paper_rows()), tau=0.8)
    assert kept[0].tolist() == expected.tolist() and kept[0].shape[2] < N


def test_it_is_the_seed_rule():
    assert (POLICY.tau, POLICY.recent_probes, POLICY.random_probes, POLICY.keep_recent) == (0.975, 64, 64, 1)
    assert (POLICY.unselected, POLICY.prefill, POLICY.floor, POLICY.keep_first) == ("zero", "sparse", 0.0, 0)
    assert (POLICY.score, POLICY.pooling, POLICY.dense_layers, POLICY.score_every) == ("normalised", 1, 0, 1)
