"""Which attentions stay dense since what reads them cannot take rows of zeros; their cache is compacted."""

import pytest
import torch
import torch.nn.functional as F
from support.hidden_states import RATIO, N, P, Stack, hidden_states
from support.recording import LATER
from torch import nn

from zipvl_compile.passes import keep_true_rows
from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.tokenwise.zero_rows import LEAVES_THE_GRAPH
from zipvl_compile.pipeline import without

ROWS = without(*LATER, "demand_rows", "prune_projections")


def per_token(x, *_):
    return x / x.abs().amax(-1, keepdim=True)


def dense(graph):
    return [node for node in graph.nodes if is_op(node, "scaled_dot_product_attention")]


@pytest.mark.parametrize("unselected", ["zero", "all"])
@pytest.mark.parametrize("place", ["attended", "projected"])
def test_a_layer_that_scales_each_token_gets_the_rows_of_the_model(record, place, unselected):
    module, x = Stack(layers=1, **{place: per_token}), hidden_states()
    (out, (keys, _, kept)), recorder = record(module, x, rows=ROWS, unselected=unselected, **RATIO)
    (site,) = recorder.sites[0].prefill
    assert "may divide a row of zeros by zero" in site.needs_true_rows and site.rewritten
    assert dense(recorder.graphs[0]) and kept.shape[2] == P and keys.shape[2] < N
    torch.testing.assert_close(out, module(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", ["attended", "projected"])
def test_held_rows_are_rows_of_the_model(record, place):
    module, x = Stack(layers=1, **{place: per_token}), hidden_states()
    rows = without(*LATER, "read_demands", "demand_rows", "prune_projections")
    (out, (_, _, kept)), recorder = record(module, x, rows=rows, unselected="hold", **RATIO)
    assert not dense(recorder.graphs[0]) and kept[0, 0, 0] == 0
    assert out.isfinite().all() and not torch.allclose(out, module(x)[0])


def test_queries_that_see_no_kept_token_have_a_row_of_zeros_too(record):
    """So `unselected="all"` is no way out: with few tokens kept, none of them is among the first ones."""
    few = {"unselected": "all", "keep_ratio": 0.1}
    (_, (_, _, kept)), _ = record(Stack(layers=1), hidden_states(), rows=ROWS, **few)
    assert kept.min() > 0

    torch._dynamo.reset()
    module = Stack(layers=1, projected=per_token)
    (out, _), _ = record(module, hidden_states(), rows=ROWS, **few)
    assert out.isfinite().all()


def test_where_every_token_is_kept_nothing_is_zero(record):
    module, x = Stack(layers=1, projected=per_token), hidden_states()
    (out, _), recorder = record(module, x, rows=ROWS, tau=1.0)
    assert not dense(recorder.graphs[0])
    torch.testing.assert_close(out, module(x)[0], rtol=1e-12, atol=1e-12)


def test_a_plain_layer_takes_zeros(record):
    _, recorder = record(Stack(), hidden_states(), rows=ROWS, **RATIO)
    assert [site.needs_true_rows for site in recorder.sites[0].prefill] == ["", ""]
    assert not dense(recorder.graphs[0])


def test_a_fault_of_the_proof_keeps_the_attention_dense(record, monkeypatch):
    monkeypatch.setattr(keep_true_rows.zero_rows, "refusal", lambda node, axis: 1 / 0)
    _, recorder = record(Stack(layers=1), hidden_states(), rows=ROWS, **RATIO)
    (site,) = recorder.sites[0].prefill
    assert "zipvl failed on it (ZeroDivisionError" in site.needs_true_rows and dense(recorder.graphs[0])


class AttentionOnly(nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.modules = modules

    def forward(self, q, k, v):
        stored = self.modules.cache(k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), *stored


def test_rows_that_leave_the_graph_are_read_by_something_unknown(record, modules):
    _, recorder = record(AttentionOnly(modules), *modules.qkv(), rows=ROWS, **RATIO)
    (site,) = recorder.sites[0].prefill
    assert site.needs_true_rows == LEAVES_THE_GRAPH and dense(recorder.graphs[0])
