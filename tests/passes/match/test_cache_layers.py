"""Which attention fills or reads which layer of the cache, and the values that say why one stays dense."""

import pytest
import torch
from support.graph_modules import Wrapped, trace

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.graph.op_calls import KVViewCall, TokenPositionsCall
from zipvl_compile.passes.match import cache_layers
from zipvl_compile.passes.match.cross_attention import is_cross_attention
from zipvl_compile.passes.match.near_miss import NearMiss
from zipvl_compile.passes.match.outcome import PARTS, Demand, Pruning, SiteOutcome
from zipvl_compile.passes.match.reasons import BY_DESIGN, CROSS_ATTENTION, Reason, Why, fault
from zipvl_compile.passes.match.sites import match, read_all


def graph_of(function, *inputs):
    return trace(Wrapped(function), *inputs)


def test_a_layer_is_filled_by_the_attention_whose_keys_and_values_it_stores(modules):
    def two(q, k, v):
        first = modules.attend(q, k, v, is_causal=True), modules.cache(k, v)
        return first, modules.attend(q, k + 1, v * 2, is_causal=True), modules.cache(k + 1, v * 2)

    graph = graph_of(two, *modules.qkv())
    attentions, _ = read_all(graph)
    filled = cache_layers.filled_by(graph, attentions)
    markers = [call.node for call in TokenPositionsCall.all(graph)]
    assert len(filled) == 1, "the second attention computes its keys anew: two nodes, no layer of its own"
    ((attention, marker),) = filled.values()
    assert marker is markers[0] and cache_layers.stored_by(marker) == [attention.key, attention.value]
    assert len(cache_layers.gathers(marker)) == 2 and cache_layers.only_cached(marker)


def test_a_layer_that_something_else_reads_is_not_only_cached(modules):
    def again(q, k, v):
        keys, values, kept = modules.cache(k, v)
        return modules.attend(q, k, v, is_causal=True), keys + 1, values, kept

    graph = graph_of(again, *modules.qkv())
    (marker,) = [call.node for call in TokenPositionsCall.all(graph)]
    assert not cache_layers.only_cached(marker)


def test_views_of_the_cache_are_found_above_what_is_computed_from_them(modules):

    def decode(q, k, v, kept):
        keys, values = ops.kv_view(k, kept, 20, 20), ops.kv_view(v, kept, 20, 20)
        return modules.attend(q, keys * 2, values + 1)

    q, k, v = modules.qkv()
    graph = graph_of(decode, q[:, :, :1], k, v, torch.arange(20).repeat(2, 1, 1))
    (attention,), _ = read_all(graph)
    views = KVViewCall.all(graph)
    assert {view.node for view in cache_layers.views_above(attention)} == {view.node for view in views}
    assert list(cache_layers.shown_to(graph, [attention])) == [attention.node]
    assert views[0].layer == views[1].layer and len(match(graph).decode) == 1


def test_nothing_is_computed_from_nothing():
    assert cache_layers.computed_from([], []) is None


def test_attention_without_projections_is_not_called_cross_attention(modules):
    graph = graph_of(lambda q, k, v: modules.attend(q, k, v), *modules.qkv())
    (attention,), _ = read_all(graph)
    assert not is_cross_attention(attention)


def test_reasons_are_values_and_read_as_texts():
    short = Reason(Why.SHORT_PROMPT, "prompt shorter than min_tokens=64", 64)
    assert str(short) == short.text and short.by_design and short.min_tokens == 64
    assert CROSS_ATTENTION.by_design and not Reason(Why.DROPOUT, "x").by_design
    assert Why.FAULT not in BY_DESIGN and Why.OTHER_GRAPH not in BY_DESIGN


def test_a_fault_is_a_reason_in_one_line():
    reason = fault(ValueError("several\nlines " + "and many words " * 50))
    assert reason.why is Why.FAULT and not reason.by_design
    assert "ValueError: several lines and many" in str(reason) and "\n" not in str(reason) and len(str(reason)) < 300


def test_outcomes():
    dense, sparse = SiteOutcome("a", "prefill", Reason(Why.DROPOUT, "x")), SiteOutcome("a", "prefill")
    assert sparse.rewritten and not dense.rewritten and not dense.by_design
    assert SiteOutcome("a", "other", CROSS_ATTENTION).by_design and not sparse.by_design
    assert sparse == SiteOutcome("a", "prefill", mask="causal"), "what nobody compares"
    pruned = Pruning("layer", {"v": "read by 'add' as well"})
    assert pruned.parts == ("q", "output") and set(PARTS) == {"q", "v", "output"}
    assert str(pruned) == "layer pruned: q, output; v for every token: read by 'add' as well"
    assert str(Demand("slice(-1, None, None)")).endswith("only those are computed")


@pytest.mark.parametrize(("target", "alone"), [(torch.softmax, False), (torch.sin, True)])
def test_a_near_miss_names_pattern_and_difference(target, alone):
    graph = torch.fx.Graph()
    miss = NearMiss(graph.call_function(target, (graph.placeholder("x"), -1)), "eager attention", "no keys")
    assert str(miss.reason) == "nearest pattern: eager attention; first difference: no keys"
    assert miss.listed_alone is alone and miss.name.startswith("(")
