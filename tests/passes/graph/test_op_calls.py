"""Typed views of the operators: the fields are the schemas', calls are read and written without places of arguments."""

from dataclasses import replace

import pytest
import torch
from torch.fx import Graph

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.graph import evicted_calls as _evicted_calls  # noqa: F401  (defines views)
from zipvl_compile.passes.graph.op_call import OpCall
from zipvl_compile.passes.graph.op_calls import GatherTokensCall, SelectTokensCall, TokenScoresCall, has_kernels

VIEWS = OpCall.__subclasses__()
WRITTEN_BY_THE_CACHE_LAYER = {"append_tokens"}  # no pass looks at it
BEHIND_ANOTHER = {"token_scores_torch", "append_tokens_torch", "decode_attention_torch", "decode_quantised_torch"}


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_fields_are_those_of_the_schema(view):
    assert view.names() == [argument.name for argument in view.operator._schema.arguments]


def test_every_operator_has_a_view():
    seen = {view.operator._schema.name.split("::")[1] for view in VIEWS}
    every = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "zipvl::" in name}
    assert every - seen == WRITTEN_BY_THE_CACHE_LAYER | BEHIND_ANOTHER


@pytest.fixture
def graph():
    graph = Graph()
    for name in ("q", "k", "x", "positions"):
        graph.placeholder(name)
    graph.output(())
    return graph


def scores(graph):
    q, k, *_ = graph.nodes
    return TokenScoresCall(
        q=q,
        k=k,
        mask=None,
        is_causal=True,
        scale=None,
        softcap=None,
        recent_probes=3,
        random_probes=4,
        seed=5,
        groups=1,
    ).insert(graph.output_node())


def test_what_is_inserted_is_read_again(graph):
    node = scores(graph)
    call = TokenScoresCall.read(node)
    assert (call.recent_probes, call.random_probes, call.seed, call.node) == (3, 4, 5, node)
    assert node.target is ops.token_scores.default and not node.kwargs
    assert TokenScoresCall.all(graph) == [call] and TokenScoresCall.matches(node) and not SelectTokensCall.matches(node)


def test_arguments_are_changed_by_name(graph):
    node = scores(graph)
    call = TokenScoresCall.read(node)
    replace(call, q=call.k, kernel_="torch").write()
    again = TokenScoresCall.read(node)
    assert again.q is call.k and again.kernel_ == "torch" and node.kwargs == {"kernel_": "torch"}
    assert replace(again, seed=9).insert(node).kwargs == {"kernel_": "torch"}


def test_packets_and_keywords_are_read_too(graph):
    *_, x, positions, output = graph.nodes
    with graph.inserting_before(output):
        node = graph.call_function(ops.gather_tokens, (x,), {"positions": positions, "spare": 2})
    call = GatherTokensCall.read(node)
    assert (call.x, call.positions, call.spare, call.kernel_) == (x, positions, 2, "auto")
    assert has_kernels(node) and not has_kernels(x)


def test_another_operator_is_an_error(graph):
    with pytest.raises(TypeError, match=r"node: expected a call of zipvl\.select_tokens\.default, got zipvl"):
        SelectTokensCall.read(scores(graph))


def test_a_field_that_is_missing_is_an_error(graph):
    with pytest.raises(TypeError, match="spare"):
        GatherTokensCall(x=next(iter(graph.nodes)), positions=next(iter(graph.nodes)))
