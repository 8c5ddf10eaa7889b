"""Where layers end, read from graphs: the sum below each MLP, and the tensor that passes."""

import pytest
import torch
from support.hidden_states import RATIO, Stack, hidden_states

from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.residual_stream import END, NO_RESIDUAL, find


def sites(record, **form):
    _, recorder = record(Stack(layers=3, **form), hidden_states(), **RATIO)
    return [site.node for site in recorder.sites[0].prefill]


def test_the_end_of_a_layer_is_the_entry_of_the_next(record):
    ends = [find(node, Axes(2)) for node in sites(record)]
    assert ends[0].entry.op == "placeholder"
    assert [end.entry for end in ends[1:]] == [end.output for end in ends[:-1]]
    assert all(is_op(end.output, "add") and end.axes == Axes(1) and not end.scaling for end in ends)
    assert ends[-1].stop == END and "token_scores" in ends[0].stop


def test_what_scales_the_stream_on_its_way_is_noted_from_top_to_bottom(record):
    def joined(x, a, mlp):
        x = x + a
        x = (x / 2).float() + mlp(x).float()
        return x.double() * torch.pi

    for node in sites(record, joined=joined):
        end = find(node, Axes(2))
        assert [scaled.target if scaled.op == "call_method" else scaled.target.__name__ for scaled in end.scaling] == [
            "truediv", "float", "double", "mul",
        ]  # fmt: skip


@pytest.mark.parametrize("joined", [lambda x, a, mlp: a + a, lambda x, a, mlp: x.abs() + a, lambda x, a, mlp: x - a])
def test_another_sum_is_no_end(record, joined):
    with pytest.raises(Mixes, match="token_scores|" + NO_RESIDUAL):
        find(sites(record, joined=joined)[0], Axes(2))
