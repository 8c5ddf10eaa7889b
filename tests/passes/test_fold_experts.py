"""Mixtures of experts as single calls, and that the operations come back as they were."""

import pytest
import torch
from support.experts import TAKEN, WEIGHTS, WIDTH, X, back, ends_of, expert, graph_of, mixture, route, written_out

from zipvl_compile.passes import fold_experts, unfold_experts
from zipvl_compile.passes.graph.experts import RoutedExperts
from zipvl_compile.passes.graph.graph import insert_call
from zipvl_compile.passes.graph.reading import is_op, written
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def folded(function, *inputs, dynamic=False):
    gm = graph_of(function, *inputs, dynamic=dynamic)
    fold_experts.apply(gm.graph, Sites(), Settings())
    gm.graph.lint()
    return gm


def calls(gm):
    return [node for node in gm.graph.nodes if is_op(node, "routed_experts")]


def run(gm, x=X):
    """Run a graph with tokens, their number where it is asked for, and `WEIGHTS`."""
    gm.recompile()
    of_rank = {2: iter((x, WEIGHTS[0])), 3: iter(WEIGHTS[1:])}
    fakes = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    return gm(*(len(x) if isinstance(fake, torch.SymInt) else next(of_rank[fake.dim()]) for fake in fakes))[0]


def test_the_mixture_is_that_of_its_tokens_one_by_one():
    torch.testing.assert_close(mixture(X, *WEIGHTS), written_out(X, *WEIGHTS))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_mixture_becomes_one_call_and_comes_back(dynamic):
    gm = folded(mixture, X, *WEIGHTS, dynamic=dynamic)
    (call,) = calls(gm)
    assert isinstance(call.target, RoutedExperts) and call.target.experts == TAKEN and call.target.tokens == 3
    assert not [node for node in gm.graph.nodes if is_op(node, "sort", "grouped_mm", "histc", "setitem")]
    expected = mixture(X, *WEIGHTS)
    torch.testing.assert_close(run(gm), expected, rtol=1e-12, atol=1e-12)
    unfold_experts.apply(gm.graph, Sites(), Settings())
    gm.graph.lint()
    assert not calls(gm) and len([node for node in gm.graph.nodes if is_op(node, "grouped_mm")]) == 2
    torch.testing.assert_close(run(gm), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_call_is_for_any_number_of_tokens(dynamic):
    """What was traced for 11 tokens is run, and put back, for 5 of them."""
    gm = folded(mixture, X, *WEIGHTS, dynamic=dynamic)
    (call,) = calls(gm)
    call.args = tuple(
        insert_call(call, torch.narrow, (x, 0, 3, 5)) if place < call.target.tokens else x
        for place, x in enumerate(call.args)
    )
    call.meta["example_value"] = insert_call(call, call.target, call.args).meta["example_value"]
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((call,),)
    expected = written_out(X, *WEIGHTS)[3:8]
    torch.testing.assert_close(run(gm).sum(1), expected)
    unfold_experts.apply(gm.graph, Sites(), Settings())
    torch.testing.assert_close(run(gm).sum(1), expected)


def test_the_router_changes_nothing_in_place_any_more():
    gm = folded(mixture, X, *WEIGHTS)
    assert not any(written(node) for node in gm.graph.nodes)


def sorted_twice(x, router, up, down):
    ids, values = route(x, router)
    flat = ids.flatten()
    order = torch.argsort(flat)
    rows = expert(x[order // TAKEN], ends_of(flat[order]), up, down)
    return (rows[torch.argsort(order)].view(-1, TAKEN, WIDTH) * values[..., None]).sum(1)


def biased(x, router, up, down):
    ids, values = route(x, router)
    by_expert, order = torch.sort(ids.reshape(-1))
    rows = expert(x[order // TAKEN], ends_of(by_expert), up, down) + down[:, 0][by_expert]
    rows = rows * values.reshape(-1)[order].unsqueeze(-1)
    return rows[back(order)].view(-1, TAKEN, WIDTH).sum(1)


@pytest.mark.parametrize("function", [sorted_twice, biased])
def test_other_spellings(function):
    gm = folded(function, X, *WEIGHTS)
    assert len(calls(gm)) == 1
    torch.testing.assert_close(run(gm), function(X, *WEIGHTS), rtol=1e-12, atol=1e-12)


def test_a_single_token_is_left_as_it_is():
    assert not calls(folded(mixture, X[:1], *WEIGHTS))
