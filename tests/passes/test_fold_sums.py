"""Sums over ranks as values, and parts that somebody else may read."""

import pytest
import torch
import torch.distributed as dist
from support.fake_ranks import X, graph_of, two_ranks

from zipvl_compile.passes import fold_sums
from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings


@pytest.fixture(autouse=True)
def ranks():
    with two_ranks():
        yield


def folded(function):
    gm = graph_of(function, X.clone())
    expected = gm(X.clone())
    fold_sums.apply(gm.graph, Sites(), Settings())
    gm.graph.lint()
    gm.recompile()
    for got, value in zip(gm(X.clone()), expected, strict=True):
        torch.testing.assert_close(got, value)
    return [node for node in gm.graph.nodes if is_op(node, "copy_")]


def test_a_sum_is_read_where_it_was_written():
    def f(x):
        y = x.relu()
        dist.all_reduce(y)
        return x + y, y * 2

    assert folded(f) == []


def test_what_a_cast_returns_unchanged():
    """As the sum of a mixture of experts."""

    def f(x):
        y = x.relu().to(x.dtype)
        dist.all_reduce(y)
        return (x + y,)

    assert folded(f) == []


def test_two_layers():
    def f(x):
        for _ in range(2):
            y = x.relu()
            dist.all_reduce(y)
            x = x + y
        return x

    assert folded(f) == []


def a_view(x):
    y = x.relu()
    z = y.view(-1)
    dist.all_reduce(y)
    return y + 1, z + 1


def a_cast(x):
    y = x.relu()
    z = y.to(x.dtype)
    dist.all_reduce(z)
    return y + 1, z + 1


def an_input(x):
    dist.all_reduce(x)
    return x + 1, x.relu()


def another(x):
    y = x.relu()
    z = torch.zeros_like(y)
    z.copy_(y)
    return (z,)


@pytest.mark.parametrize("function", [a_view, a_cast, an_input, another])
def test_what_others_may_see_is_still_written(function):
    assert len(folded(function)) == 1
