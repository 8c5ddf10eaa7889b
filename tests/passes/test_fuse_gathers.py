"""Keys and values compacted in one launch, and gathers that must stay apart."""

import torch
from torch.fx import Graph, GraphModule

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes import choose_kernels, fuse_gathers
from zipvl_compile.passes.graph.graph import calls
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings

K, V = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 6)
WHERE = torch.tensor([[[0, 4, 8]]])


def graph_of(write):
    """Return a graph with inputs k, v and positions, and the fake values of K, V and WHERE."""
    graph = Graph()
    inputs = []
    for name, value in (("k", K), ("v", V), ("positions", WHERE)):
        node = graph.placeholder(name)
        node.meta["example_value"] = value
        inputs.append(node)
    outputs = write(graph, *inputs)
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["example_value"] = node.target(
                *(a.meta["example_value"] if hasattr(a, "meta") else a for a in node.args)
            )
    graph.output(outputs)
    return GraphModule({}, graph)


def gather(graph, x, positions, spare=2):
    return graph.call_function(ops.gather_tokens.default, (x, positions, spare))


def used(outputs):
    return [x[:, :, :3] for x in outputs]  # spare rows are undefined


def fused(write):
    module = graph_of(write)
    expected = used(module(K, V, WHERE))
    fuse_gathers.apply(module.graph, Sites(), Settings())
    module.graph.lint()
    module.recompile()
    for got, want in zip(used(module(K, V, WHERE)), expected, strict=True):
        assert torch.equal(got, want)
    return len(calls(module.graph, ops.gather_kv)), len(calls(module.graph, ops.gather_tokens))


def test_neighbours_become_one():
    assert fused(lambda g, k, v, p: (gather(g, k, p), gather(g, v, p))) == (1, 0)


def test_two_layers_become_two():
    assert fused(lambda g, k, v, p: tuple(gather(g, x, p) for x in (k, v, v, k))) == (2, 0)


def test_other_spare_room_stays_apart():
    assert fused(lambda g, k, v, p: (gather(g, k, p), gather(g, v, p, 0))) == (0, 2)


def test_one_tensor_stored_twice_stays_apart():
    assert fused(lambda g, k, v, p: (gather(g, k, p), gather(g, k, p))) == (0, 2)


def test_gathers_with_something_between_them_stay_apart():
    def write(graph, k, v, positions):
        first = gather(graph, k, positions)
        return first, gather(graph, graph.call_function(torch.neg, (v,)), positions)

    assert fused(write) == (0, 2)


def test_the_choice_of_kernels_reaches_every_operator_that_has_one():
    def write(graph, k, v, positions):
        marker = graph.call_function(ops.token_positions.default, (k,))
        return gather(graph, k, positions), gather(graph, v, marker)

    module = graph_of(write)
    choose_kernels.apply(module.graph, Sites(), Settings(kernel="torch"))
    module.recompile()
    assert [node.kwargs for node in module.graph.nodes if node.op == "call_function"] == [
        {}, {"kernel_": "torch"}, {"kernel_": "torch"},
    ]  # fmt: skip
    assert used(module(K, V, WHERE))[0].shape == (1, 2, 3, 4)
