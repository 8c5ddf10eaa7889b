"""Where tokens and samples are, above all on one axis: rows of each sample, taken where a model has flattened them."""

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import trace
from torch._dynamo.exc import BackendCompilerFailed

from zipvl_compile.passes.graph.graph import size
from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.tokenwise import backward_slice, forward_slice
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.row_select import OfEachSample

B, N, WIDTH = 3, 5, 4
X = torch.randn(B, N, WIDTH, dtype=torch.float64)
W = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
WIDE = torch.randn(N, WIDTH, dtype=torch.float64)  # to as many features as there are tokens
INDEX = torch.tensor([[0, 4], [3, 1], [2, 2]])

FLAT = {
    "view": lambda x: F.linear(x.view(-1, WIDTH), W).view(B, N, WIDTH),
    "sizes by name": lambda x: F.linear(x.view(B * N, WIDTH), W).view(B, -1, WIDTH),
    "flatten": lambda x: F.linear(x.flatten(0, 1), W).reshape(x.shape),
    "reshaped inside": lambda x: F.linear(x.view(-1, WIDTH), W).view(-1, 2, 2).cos().reshape(B, N, WIDTH),
    "an axis before": lambda x: x[None].reshape(1, -1, WIDTH).cos().view(1, B, N, WIDTH)[0],
    "a gate": lambda x: (x.view(-1, WIDTH) * F.linear(x.reshape(-1, WIDTH), W)).view(B, N, WIDTH),
    "one row for all": lambda x: (x.view(-1, WIDTH) * x.mean((0, 1))).view(B, N, WIDTH),
}


def of_some(function, result=lambda h: h):
    """Run a function of x for the rows `INDEX` of each sample, from those of its input."""

    def backend(gm, _):
        graph = gm.graph
        out, index = graph.output_node().args[0]
        axes = Axes(1, 0) if out.meta["example_value"].dim() == 3 else Axes(0, 0, B)
        cone = backward_slice.find(graph, {out: axes}, lambda node, _: node.op == "placeholder")
        if cone.stops:
            raise Mixes(next(iter(cone.stops.values())))
        end, rows = graph.output_node(), OfEachSample(index, 2)
        taken = {source: rows.take(source, own, end) for source, own in cone.sources.items()}
        end.args = ((cone.again(taken, 2, end)[out], index),)
        cone.erase()
        graph.lint()
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(lambda x, index: (function(x), index + 0), backend=backend, dynamic=False)(X, INDEX)[0]


def rows_of(x):
    return x.gather(1, INDEX[..., None].expand(-1, -1, x.shape[2]))


@pytest.mark.parametrize("form", FLAT)
def test_rows_of_what_is_flattened(form):
    torch.testing.assert_close(of_some(FLAT[form]), rows_of(FLAT[form](X)))


def test_rows_of_a_result_that_stays_flattened():
    got = of_some(lambda x: F.linear(x, W).view(-1, WIDTH))
    torch.testing.assert_close(got, rows_of(F.linear(X, W)).flatten(0, 1))


APART = "takes the token axis apart"
NEAR_MISSES = {
    "tokens first": (lambda x: x.transpose(0, 1).reshape(-1, WIDTH).cos().view(B, N, WIDTH), APART),
    "heads between": (
        lambda x: x.view(B, N, 2, 2).transpose(1, 2).flatten(0, 2).cos().view(B, 2, N, 2).transpose(1, 2).flatten(2),
        APART,
    ),
    "parted as others": (lambda x: x.view(-1, WIDTH).cos().view(N, B, WIDTH).transpose(0, 1), APART),
    "tokens before samples": (
        lambda x: F.linear(x, WIDE).transpose(0, 1).reshape(N, B * N).cos().view(N, B, N).transpose(0, 1),
        APART,
    ),
    "features, too": (lambda x: x.view(-1).cos().view(B, N, WIDTH), APART),
    "mixed while joined": (lambda x: x.view(-1, WIDTH).cumsum(0).view(B, N, WIDTH), "'cumsum' may mix tokens"),
    "changed in place": (lambda x: x.cos().view(-1, WIDTH).mul_(2).view(B, N, WIDTH), "in place"),
}


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_what_is_joined_otherwise_is_not_taken(form):
    function, why = NEAR_MISSES[form]
    with pytest.raises(BackendCompilerFailed, match=rf"Mixes: .*({why})"):
        of_some(function)


@pytest.mark.parametrize("form", FLAT)
def test_downwards_as_upwards(form):
    graph = trace(lambda x: FLAT[form](x.sin()), X)
    start = next(node for node in graph.nodes if is_op(node, "sin"))
    known = {start: Axes(1, 0)}
    for node in list(graph.nodes):
        if start < node and node.op != "output" and set(node.all_input_nodes) & set(known):
            if not isinstance(node.meta["example_value"], torch.Tensor) or is_op(node, "mean"):
                continue
            known[node], _ = forward_slice.follow(node, known, set())
    (result,) = graph.output_node().all_input_nodes
    assert known[result] == Axes(1, 0) and any(axes.joined for axes in known.values())


def test_joined_rows_are_put_back():
    graph = trace(lambda x, index: (x.view(-1, WIDTH) + 0, index + 0), X, INDEX)
    x, index = graph.output_node().args[0]
    end, axes = graph.output_node(), Axes(0, 0, B)
    rows = OfEachSample(index, size(index, 1, end))
    end.args = (rows.put(rows.take(x, axes, end), axes, x, end),)
    module = torch.fx.GraphModule({}, graph)
    torch.testing.assert_close(module(X, INDEX), X.view(-1, WIDTH))
    taken = next(node for node in graph.nodes if is_op(node, "index_select"))
    end.args = (taken,)
    module.recompile()
    torch.testing.assert_close(module(X, INDEX), rows_of(X).flatten(0, 1))
