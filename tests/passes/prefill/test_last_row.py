"""The newest row alone: the last row of the attention over the whole prompt, whatever tokens get that are not kept."""

import operator

import pytest
import torch
from support.hidden_states import RATIO, Stack, hidden_states
from support.recording import LATER

from zipvl_compile.passes.graph.graph import insert_call
from zipvl_compile.passes.graph.op_calls import DecodeAttentionCall, WindowAttentionCall
from zipvl_compile.passes.prefill.last_row import LAST, attend_last
from zipvl_compile.pipeline import Row, without

RULES = {
    "zero": ({}, DecodeAttentionCall),
    "hold": ({"unselected": "hold"}, DecodeAttentionCall),
    "all": ({"unselected": "all"}, DecodeAttentionCall),
    "window": ({"unselected": "window", "window": 3}, DecodeAttentionCall),
    "kept and window": ({"unselected": "window", "window": 3, "kept_window": True}, WindowAttentionCall),
    "union": ({"unselected": "all", "window": 3, "kept_window": True}, WindowAttentionCall),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_newest_row_is_that_of_the_whole_attention(record, rule, batch):
    options, kind = RULES[rule]

    def return_both(graph, sites, settings):
        node, output = sites.prefill[0].node, graph.output_node()
        row, attention = attend_last(node, output)
        assert kind.matches(attention)
        whole = insert_call(output, operator.getitem, (node, (slice(None), slice(None), LAST)))
        rows = insert_call(output, torch.stack, ((row, whole),))
        output.replace_input_with(output.args[0][0], rows)

    rows = (*without("read_demands", "keep_true_rows", "demand_rows", "prune_projections", *LATER),
            Row("return both", return_both, (), ""))  # fmt: skip
    stack, x = Stack(), hidden_states(batch=batch)
    (both, *_), _ = record(stack, x, rows=rows, inner="eager", **RATIO, **options)
    assert both.shape[0] == 2 and both.shape[3] == 1
    torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)
