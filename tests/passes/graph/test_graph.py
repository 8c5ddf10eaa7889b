"""Erasing exactly what a rewrite orphaned, and fake values of new nodes."""

import operator

import pytest
import torch
from torch.fx import Graph

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.graph.graph import calls, erase_orphans, example, insert_call, is_call


def chain(*targets):
    """Return a graph x -> method -> method ... -> output(x), and its call nodes; nobody reads the last one."""
    graph = Graph()
    node = x = graph.placeholder("x")
    nodes = []
    for target in targets:
        node = graph.call_method(target, (node,)) if isinstance(target, str) else graph.call_function(target, (node, 1))
        nodes.append(node)
    graph.output(x)
    return graph, nodes


def targets(graph):
    return [node.target for node in graph.nodes if node.op.startswith("call")]


def test_a_chain_of_orphans_goes_up_to_its_inputs():
    graph, nodes = chain("expand", torch.repeat_interleave, "reshape")
    erase_orphans([nodes[-1]])
    assert targets(graph) == []
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]
    graph.lint()


def test_a_node_with_readers_stays_with_all_above_it():
    graph, nodes = chain("expand", "reshape", "exp")
    erase_orphans([nodes[0], nodes[1]])
    assert targets(graph) == ["expand", "reshape", "exp"]


@pytest.mark.parametrize("write", ["mul_", "scatter_", "__setitem__", "zero_", "logical_not_"])
def test_the_chain_ends_at_an_in_place_method(write):
    graph, nodes = chain("expand", write, "reshape")
    erase_orphans([nodes[-1]])
    assert targets(graph) == ["expand", write]


@pytest.mark.parametrize(
    "write", [operator.setitem, operator.iadd, torch.Tensor.add_, torch.relu_, torch.ops.aten.add_.Tensor]
)
def test_the_chain_ends_at_an_in_place_function(write):
    graph, nodes = chain("expand", write, "reshape")
    erase_orphans([nodes[-1]])
    assert targets(graph) == ["expand", write]


def test_an_out_argument_is_a_write():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.call_function(torch.add, (x, x), {"out": y})
    graph.output(y)
    erase_orphans(calls(graph, torch.add))
    assert targets(graph) == [torch.add]


def test_append_tokens_is_never_an_orphan():
    graph = Graph()
    inputs = [graph.placeholder(name) for name in "abcd"]
    for target in (ops.append_tokens, ops.append_tokens.default):
        node = graph.call_function(target, (*inputs, 3))
        erase_orphans([node])
        assert not node._erased, target
    graph.output(inputs[0])


def test_unrelated_dead_looking_nodes_stay():
    graph, nodes = chain("expand", "reshape")
    with graph.inserting_before(nodes[0]):
        graph.call_method("exp", (nodes[0].args[0],))
    erase_orphans([nodes[-1]])
    assert targets(graph) == ["exp"], "dead, but nobody's rewrite orphaned it"


def test_an_orphan_given_twice_and_things_that_are_no_nodes():
    graph, nodes = chain("expand")
    erase_orphans([nodes[0], nodes[0], None, 3])
    assert targets(graph) == []


def test_placeholders_stay():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(x)
    erase_orphans([y])
    assert len(graph.nodes) == 3


@pytest.mark.parametrize("target", [ops.token_positions, ops.token_positions.default], ids=["packet", "overload"])
def test_an_operator_counts_with_and_without_its_overload(target):
    graph = Graph()
    node = graph.call_function(target, (graph.placeholder("k"),))
    assert is_call(node, ops.token_positions) and is_call(node, ops.token_positions.default)
    assert not is_call(node, ops.kv_view) and not is_call("node", ops.token_positions)
    assert calls(graph, ops.token_positions) == [node]


def test_a_graph_without_fake_values_can_be_edited():
    graph = Graph()
    k = graph.placeholder("k")
    out = graph.output(k)
    node = insert_call(out, ops.token_positions.default, (k,))
    assert example(node) is None and example(5) == 5
    graph.lint()


def test_a_new_node_has_the_source_of_the_node_it_precedes():
    graph = Graph()
    k = graph.placeholder("k")
    old = graph.call_method("neg", (k,))
    old.meta["nn_module_stack"] = {"a": ("L['self'].layers[0]", object)}
    old.meta["stack_trace"] = "here"
    graph.output(old)
    node = insert_call(old, ops.token_positions.default, (k,))
    assert node.meta["nn_module_stack"] is old.meta["nn_module_stack"] and node.meta["stack_trace"] == "here"
    assert [n.name for n in graph.nodes][1] == node.name
