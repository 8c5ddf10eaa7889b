"""Caches that keep every token are copies; those that keep some stay gathers."""

import pytest
import torch
from support.graph_modules import rewritten
from support.hidden_states import Stack, hidden_states, without_spare

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes import keep_every_token
from zipvl_compile.passes.graph.graph import calls

N = 20


def run(module, x, inner="eager", dynamic=False):
    return rewritten(module, x, passes=["keep_every_token"], inner=inner, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_dense_layer_copies_its_keys_and_values(batch, inner, dynamic):
    module, x = Stack(), hidden_states(batch=batch)
    graph, outputs = run(module, x, inner, dynamic)
    assert len(calls(graph, ops.with_room)) == 4 and not calls(graph, ops.gather_tokens)
    with torch.no_grad():
        expected = module(x)
    for got, plain in zip(without_spare(outputs, N), without_spare(expected, N), strict=True):
        torch.testing.assert_close(got, plain)
    for (keys, values, positions), (plain, *_) in zip(outputs[1:], expected[1:], strict=True):
        assert keys.shape == values.shape == plain.shape and keys.is_contiguous() and values.is_contiguous()
        assert len({x.untyped_storage().data_ptr() for x in (keys, values, positions)}) == 3


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
