"""One ratio for all layers, by the scores of the paper."""

from support import paper
from support.policies import attention_of, paper_rows, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.policies.fixed_ratio import POLICY


def test_every_layer_keeps_the_same_number_of_its_own_tokens():
    out, kept = run("fixed_ratio", keep_ratio=0.3)
    assert [positions.shape[2] for positions in kept] == [30] * 4
    expected = paper.selection(*attention_of(0, out.hidden_states[0], paper_rows()), keep_ratio=0.3)
    assert kept[0].tolist() == expected.tolist()
    assert kept[0].tolist() != kept[1].tolist()
    assert POLICY.keep_ratio == 0.4
