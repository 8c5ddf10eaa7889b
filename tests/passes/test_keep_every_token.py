"""Caches that keep every token are copies; those that keep some stay gathers."""

import pytest
import torch
from support.graph_modules import rewritten
from support.hidden_states import Stack, hidden_states

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes import keep_every_token
from zipvl_compile.passes.graph.graph import calls
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings

N = 20


def run(module, x, inner="eager", dynamic=False):
    return rewritten(module, x, passes=["keep_every_token"], inner=inner, dynamic=dynamic)


@pytest.fixture(params=["plain", "room"])
def least(request, monkeypatch):
    """Run a test with prompts below and above the length from which decoding appends in place."""
    least = {"plain": N + 1, "room": N}[request.param]
    monkeypatch.setattr(keep_every_token, "LEAST", least)
    return least


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("batch", "inner"), [(1, "eager"), (2, "eager"), (2, "inductor")])
def test_a_dense_layer_copies_its_keys_and_values(batch, inner, dynamic, least):
    module, x = Stack(), hidden_states(batch=batch)
    graph, outputs = run(module, x, inner, dynamic)
    assert len(calls(graph, ops.with_room)) == 4 and not calls(graph, ops.gather_tokens)
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(outputs[0], expected[0])
    for (keys, values, positions), plain in zip(outputs[1:], expected[1:], strict=True):
        spare = plain[0].shape[2] - N if least == N else 0
        assert keys.shape[2] == values.shape[2] == N + spare and (positions is None) == (least > N)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in (keys, values)), "memory of its own, and no more"
        assert len({x.untyped_storage().data_ptr() for x in (keys, values, x)}) == 3
        for got, whole in zip((keys, values), plain, strict=False):
            torch.testing.assert_close(got[:, :, :N], whole[:, :, :N])


def test_positions_that_are_read_stay(least):
    """A model that looks at the positions itself gets them."""

    def reads(k):
        positions = ops.token_positions(k)
        return ops.gather_tokens(k, positions, 2), positions, positions + 1

    k, seen = torch.randn(1, 2, N, 4), []

    def backend(gm, inputs):
        keep_every_token.apply(gm.graph, Sites(), Settings())
        seen.append(len(calls(gm.graph, ops.with_room)))
        gm.recompile()
        return gm.forward

    keys, positions, later = torch.compile(reads, backend=backend)(k)
    assert keys.shape[2] == N + 2 and torch.equal(later, positions + 1) and seen == [1]


def test_a_sparse_prompt_with_a_full_cache_keeps_its_room(record, least):
    module, x = Stack(), hidden_states()
    outputs, recorder = record(module, x, keep_ratio=0.3, evict="keep")
    assert any(site.rewritten for site in recorder.noted())
    for keys, _, positions in outputs[1:]:
        assert positions.shape[2] == N < keys.shape[2]


def test_a_selection_stays_a_gather(record):
    _, recorder = record(Stack(), hidden_states(), keep_ratio=0.3)
    (graph,) = recorder.graphs
    assert not keep_every_token.find(graph) and len(calls(graph, ops.gather_tokens)) == 4


def test_positions_of_another_tensor_are_looked_up():
    def one(x, k):
        return ops.gather_tokens(x, ops.token_positions(k), 2)

    x, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 5, 4)
    seen = []

    def backend(gm, inputs):
        seen.append(keep_every_token.find(gm.graph))
        return gm.forward

    torch.testing.assert_close(torch.compile(one, backend=backend)(x, k)[:, :, :5], x[:, :, :5])
    assert seen == [[]]
