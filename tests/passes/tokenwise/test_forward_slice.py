"""Below zero rows, above sole readers, and projections in pieces: what is found, and where it ends."""

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import trace

from zipvl_compile.passes.graph.reading import is_op, spelled
from zipvl_compile.passes.tokenwise import forward_slice
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import find
from zipvl_compile.passes.tokenwise.sole_readers import computed_only_for, under_autocast
from zipvl_compile.passes.tokenwise.split_projections import pieces, split, split_above

X, W, BIAS = torch.randn(1, 7, 8), torch.randn(8, 8), torch.randn(8)
WIDE = torch.randn(24, 8)


def below(function):
    """Return what is found below the sine of x, which stands for an attention's output."""
    graph = trace(lambda x: function(x.sin(), x), X)
    start = next(node for node in graph.nodes if is_op(node, "sin"))
    return forward_slice.find(start, Axes(1))


def zero(found):
    return {spelled(node) for node in found.zero} - {"sin"}


CASES = {
    "linear": (lambda a, x: x + F.linear(a, W), {"linear"}, ""),
    "bias": (lambda a, x: x + F.linear(a, W, BIAS), set(), ""),
    "gated": (lambda a, x: x + F.linear(a * torch.sigmoid(x), W), {"mul", "linear"}, ""),
    "other by name": (lambda a, x: x + torch.matmul(a, other=W), {"matmul"}, ""),
    "a power by name": (lambda a, x: x + F.linear(torch.pow(a, exponent=2), W), {"pow", "linear"}, ""),
    "a power that is none": (lambda a, x: x + F.linear(torch.pow(a, exponent=-2), W), set(), "is not finite"),
    "divided": (lambda a, x: x + F.linear(a / 3, W), {"truediv", "linear"}, ""),
    "a divisor": (lambda a, x: x + F.linear(3 / a, W), set(), "may divide a row of zeros by zero"),
    "a constant term": (lambda a, x: x + F.linear(a + 1, W), set(), ""),
    "mixed": (lambda a, x: x + F.linear(a.cumsum(1), W), set(), "'cumsum' may mix tokens"),
}


@pytest.mark.parametrize("case", CASES)
def test_which_rows_stay_zero(case):
    function, zeros, why = CASES[case]
    found = below(function)
    assert zero(found) == zeros and found.projects is not bool(why)
    if why:
        assert any(why in reason for reason in found.stops.values())


def changed(a, x):
    a = F.linear(a, W)
    a[:, 0] = 1.0
    return x + a


def test_a_result_that_is_changed_in_place_ends_it():
    assert not below(changed).projects
    assert any("changed in place" in reason for reason in below(changed).stops.values())


def cone(function, reader="cos"):
    graph = trace(function, X)
    end = next(node for node in graph.nodes if spelled(node) == reader)
    return computed_only_for(end.args[0], Axes(1), {end})


def test_a_projection_that_only_its_reader_needs():
    found = cone(lambda x: (F.linear(x, W).cos(), x.exp()))
    assert [spelled(node) for node in found.nodes] == ["linear"]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: ((h := F.linear(x, W)).cos(), h.exp()), "read by 'exp' as well"),
        (lambda x: (x.cumsum(1).cos(),), "'cumsum' may mix tokens"),
    ],
    ids=["two readers", "mixes"],
)
def test_what_others_need_or_mixes_is_refused_with_the_reason(function, why):
    with pytest.raises(Mixes, match=why):
        cone(function)


def test_nodes_under_autocast_are_known():
    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.linear(x, W)
        return y, x.exp()

    inside = {spelled(node) for node in under_autocast(trace(function, X))}
    assert "linear" in inside and "exp" not in inside


def fused(cut):
    def function(x):
        q, k, v = cut(F.linear(x, WIDE))
        return q.cos(), k.exp(), v.exp()

    return function


@pytest.mark.parametrize(
    "cut",
    [
        lambda y: y.split(8, -1),
        lambda y: y.split(split_size=8, dim=-1),
        lambda y: y.chunk(3, dim=-1),
        lambda y: (y[..., :8], y[..., 8:16], y[..., 16:]),
    ],
    ids=["split", "by name", "chunk", "slices"],
)
def test_a_fused_projection_is_split(cut):
    graph = trace(fused(cut), X)
    projection = next(node for node in graph.nodes if is_op(node, "linear"))
    assert [(start, stop) for _, start, stop in pieces(projection)] == [(0, 8), (8, 16), (16, 24)]
    assert split(projection)
    graph.lint()
    assert sum(is_op(node, "linear") for node in graph.nodes) == 3
    gm = torch.fx.GraphModule({}, graph)
    inputs = [WIDE if node.name.startswith("g_") else X for node in graph.nodes if node.op == "placeholder"]
    for got, expected in zip(gm(*inputs), fused(cut)(X), strict=True):
        torch.testing.assert_close(got, expected)


def test_interleaved_heads_stay_one_projection():
    graph = trace(fused(lambda y: (y[..., ::3], y[..., 1::3], y[..., 2::3])), X)
    projection = next(node for node in graph.nodes if is_op(node, "linear"))
    assert not split(projection)


def test_a_cone_without_projections_has_nothing_to_split():
    graph = trace(lambda x: x.sin().cos(), X)
    end = next(node for node in graph.nodes if spelled(node) == "cos")
    assert not split_above(find(graph, {end: Axes(1)}, lambda node, cone: node.op == "placeholder"))
