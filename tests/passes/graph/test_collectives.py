"""What a graph tells of other ranks."""

import pytest
import torch
import torch.distributed as dist
from support.fake_ranks import WIDTH, Replicate, Shard, X, graph_of, spread, two_ranks
from torch.distributed.tensor import Partial

from zipvl_compile.passes.graph.collectives import Uneven, communicates, groups, insert_sum, is_spread, summed_over
from zipvl_compile.passes.graph.reading import example


@pytest.fixture
def mesh():
    with two_ranks() as found:
        yield found


def test_the_groups_of_a_weight(mesh):
    name = mesh.get_group().group_name
    assert groups(spread(mesh, 4, WIDTH, on=Shard(0))) == groups(spread(mesh, 4, WIDTH, on=Shard(1))) == {name}
    assert groups(spread(mesh, 4, WIDTH, on=Replicate())) == groups(torch.ones(2)) == groups(None) == set()
    assert is_spread(spread(mesh, 4, WIDTH, on=Replicate())) and not is_spread(torch.ones(2)) and not is_spread(None)


@pytest.mark.parametrize("told", [{"on": Partial()}, {"on": Shard(0), "whole": (7, WIDTH)}], ids=["sum", "uneven"])
def test_parts_that_are_no_even_shards(mesh, told):
    with pytest.raises(Uneven):
        groups(spread(mesh, 4, WIDTH, **told))


def test_sums_in_a_graph(mesh):
    def f(x):
        a, b = x + 1, x + 2
        dist.all_reduce(a)
        dist.all_reduce(b, op=dist.ReduceOp.MAX)
        return a * b

    gm = graph_of(f, X)
    said = [summed_over(node) for node in gm.graph.nodes if "all_reduce" in str(node.target)]
    assert said == [mesh.get_group().group_name, None]
    between = [node for node in gm.graph.nodes if communicates(node)]
    assert len(between) == 4, "two reductions, and what waits for them"
    assert all("c10d" in str(node.target) for node in between)


def test_a_sum_that_is_inserted(mesh):
    gm = graph_of(lambda x: x + 1, X)
    add = next(node for node in gm.graph.nodes if node.op == "call_function")
    found = insert_sum(add, mesh.get_group().group_name, next(iter(add.users)))
    assert (example(found).shape, example(found).dtype) == (X.shape, X.dtype)
    summed = found.args[0].args[0]
    assert summed_over(summed) == mesh.get_group().group_name and example(summed).dtype == torch.int64
    add.replace_all_uses_with(found, delete_user_cb=lambda user: user.op == "output")
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(X)[0], X + 1, rtol=1e-6, atol=1e-11)
