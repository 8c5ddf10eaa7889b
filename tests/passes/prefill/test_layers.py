"""Which layers select: the first ones may keep every token, one may select for those that follow."""

import pytest
import torch
from support.graph_modules import Wrapped
from support.hidden_states import RATIO, N, P, Stack, both, hidden_states

from zipvl_compile.passes import sparsify_prefill
from zipvl_compile.passes.graph.op_calls import SelectTokensCall, SparseAttentionCall
from zipvl_compile.passes.match.reasons import Why
from zipvl_compile.passes.prefill.refusals import number_of


@pytest.mark.parametrize(("dense", "kept"), [(0, [P, P, P]), (1, [N, P, P]), (2, [N, N, P]), (9, [N, N, N])])
def test_the_first_layers_keep_every_token(record, dense, kept):
    module, x = Stack(layers=3), hidden_states()
    (out, *caches), recorder = record(module, x, dense_layers=dense, **RATIO)
    assert [cache[2].shape[2] for cache in caches] == kept
    reasons = [site.reason for site in recorder.sites[0].prefill]
    assert [reason is not None and reason.why is Why.DENSE_LAYER for reason in reasons] == [n == N for n in kept]
    assert all(reason is None or (reason.by_design and f"dense_layers={dense}" in str(reason)) for reason in reasons)
    if dense == 9:
        torch.testing.assert_close(out, module(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dense", "kept"), [((1,), [P, N, P]), ((0, 2), [N, P, N]), ((), [P, P, P])])
def test_layers_by_their_numbers_keep_every_token(record, dense, kept):
    (_, *caches), recorder = record(Stack(layers=3), hidden_states(), dense_layers=dense, **RATIO)
    assert [cache[2].shape[2] for cache in caches] == kept
    reasons = [str(site.reason) for site in recorder.sites[0].prefill if site.reason is not None]
    assert reasons == [f"one of the layers that keep every token: dense_layers={dense}"] * kept.count(N)


def test_one_layer_selects_for_those_that_follow(record):
    (_, *caches), recorder = record(Stack(layers=3), hidden_states(batch=2), score_every=0, dense_layers=1, **RATIO)
    (_, first, second) = (cache[2] for cache in caches)
    assert first.shape[2] == P and torch.equal(first, second)
    assert len(SelectTokensCall.all(recorder.graphs[0])) == 1 and len(SparseAttentionCall.all(recorder.graphs[0])) == 2
    (_, *alone), _ = record(Stack(layers=3), hidden_states(batch=2), dense_layers=1, **RATIO)
    assert torch.equal(alone[1][2], first) and not torch.equal(alone[2][2], second), "it must matter in this case"


def test_a_selection_that_was_undone_serves_no_layer(record, monkeypatch):
    real, calls = sparsify_prefill.compact, []

    def fail_once(*given):
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError("a fault of ours")
        return real(*given)

    monkeypatch.setattr(sparsify_prefill, "compact", fail_once)
    (_, *caches), recorder = record(Stack(layers=3), hidden_states(), score_every=0, **RATIO)
    assert [cache[2].shape[2] for cache in caches] == [N, P, P] and torch.equal(caches[1][2], caches[2][2])
    assert [site.rewritten for site in recorder.sites[0].prefill] == [False, True, True]


def test_a_selection_of_each_head_serves_no_layer_of_other_heads(record, modules):
    """OpenELM's layers have heads of their own: one that the shared selection does not fit selects for itself."""
    q, k, v = modules.qkv()

    def forward(q, k, v):
        wide = [torch.cat([x, 2 * x], 1) for x in (q, k, v)]
        found = [(modules.attend(*x, is_causal=True), modules.cache(*x[1:])) for x in ((q, k, v), wide, wide)]
        return *(out for out, _ in found), *(stored for _, cached in found for stored in cached)

    for groups, selections in (("kv_head", 2), ("layer", 1)):
        torch._dynamo.reset()
        _, recorder = record(Wrapped(forward), q, k, v, score_every=0, groups=groups)
        assert len(SelectTokensCall.all(recorder.graphs[0])) == selections
        assert [site.reason for site in recorder.sites[0].prefill] == [None] * 3


def test_projections_are_pruned_for_a_shared_selection(record):
    both(record, Stack(layers=3), hidden_states(), score_every=0, **RATIO)


def test_a_dense_prefill_gives_the_answer_of_the_model_and_a_small_cache(record):
    module, x = Stack(), hidden_states(batch=2)
    (out, *caches), recorder = record(module, x, prefill="dense", rows=None, **RATIO)
    torch.testing.assert_close(out, module(x)[0], rtol=1e-12, atol=1e-12)
    assert all(cache[2].shape[2] == P and cache[0].shape[2] < N for cache in caches)
    assert all(site.rewritten and 'prefill="dense"' in site.needs_true_rows for site in recorder.sites[0].prefill)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("language_model.layers.3.self_attn", 3), ("layers.11", 11), ("transformer.h.7.attn.attention", 7),
        ("model.blocks.2.mixer.0.attn", 2), ("encoder.5.attention", 5), ("self_attn", 9), ("(sdpa_1)", 9),
        ("w2v.attn", 9),
    ],
)  # fmt: skip
def test_the_number_of_a_layer(path, number):
    assert number_of(path, 9) == number
