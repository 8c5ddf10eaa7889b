"""Which ranks share the heads of an attention, and what must not be taken for it."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.fake_ranks import WIDTH, Replicate, Shard, X, attend, graph_of, local, spread, two_ranks, weights

from zipvl_compile.passes.match.reasons import Why
from zipvl_compile.passes.match.sites import read_all
from zipvl_compile.passes.policy import Policy
from zipvl_compile.passes.prefill import ranks


@pytest.fixture
def mesh():
    with two_ranks() as found:
        yield found


def layer(x, wq, wk, wv, wo, group=None, op=dist.ReduceOp.SUM):
    y = F.linear(attend(x, wq, wk, wv), local(wo))
    dist.all_reduce(y, op=op, group=group)
    return x + y


def attention(function, *inputs):
    (found,), _ = read_all(graph_of(function, X, *inputs).graph)
    return found


def group_of(found):
    return ranks.group_of(found.query, found.node)


def shared(found, policy):
    return ranks.shared_by(found.query, found.node, policy)


def test_heads_of_one_rank():
    def alone(x, wq, wk, wv, wo):
        return x + F.linear(attend(x, wq, wk, wv), wo)

    found = attention(alone, *weights(None))
    assert shared(found, Policy(groups="kv_head")) == (None, None)


def test_heads_that_two_ranks_share(mesh):
    found = attention(layer, *weights(mesh))
    assert group_of(found) == mesh.get_group().group_name
    assert shared(found, Policy()) == (group_of(found), None)
    for policy, says in ((Policy(groups="kv_head"), "groups="), (Policy(score="value"), "score=")):
        group, reason = shared(found, policy)
        assert group is None
        assert reason.why is Why.RANKS and says in reason.text and "several ranks share" in reason.text


def test_whole_weights_on_every_rank_share_nothing(mesh):
    """What is replicated selects the same on every rank."""

    def whole(x, wq, wk, wv, wo):
        return x + F.linear(attend(x, wq, wk, wv), local(wo))

    assert group_of(attention(whole, *weights(mesh, Replicate(), Replicate()))) is None


def test_ranks_that_share_other_parts_of_the_layer_are_not_known_to_agree(mesh):
    def shared_mlp(x, wq, wk, wv, wo):
        h = x + F.linear(attend(x, local(wq), local(wk), local(wv)), local(wo))
        y = F.linear(h, local(wo))
        dist.all_reduce(y)
        return h + y

    with pytest.raises(ranks.Unknown):
        group_of(attention(shared_mlp, *weights(None)))


def middle(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_heads_that_come_from_another_graph_are_not_known_to_be_all(mesh):
    (found,), _ = read_all(graph_of(middle, *torch.randn(3, 1, 2, 12, 8)).graph)
    with pytest.raises(ranks.Unknown):
        group_of(found)


def test_heads_that_come_from_another_graph_of_one_process():
    (found,), _ = read_all(graph_of(middle, *torch.randn(3, 1, 2, 12, 8)).graph)
    assert group_of(found) is None


def no_sum(x, wq, wk, wv, wo):
    return x + F.linear(attend(x, wq, wk, wv), local(wo))


def twice_projected(x, wq, wk, wv, wo):
    out = attend(x, wq, wk, wv)
    y, z = F.linear(out, local(wo)), F.linear(out, local(wq))
    dist.all_reduce(y)
    return x + y + z


def summed_heads(x, wq, wk, wv, wo):
    out = attend(x, wq, wk, wv)
    dist.all_reduce(out)
    return x + F.linear(out, local(wo))


@pytest.mark.parametrize("function", [no_sum, twice_projected, summed_heads])
def test_other_ways_to_share_heads_are_not_known(mesh, function):
    found = attention(function, *weights(mesh))
    with pytest.raises(ranks.Unknown):
        group_of(found)
    assert shared(found, Policy()) == (None, ranks.UNKNOWN)


def test_another_reduction_is_none(mesh):
    with pytest.raises(ranks.Unknown):
        group_of(attention(lambda x, *w: layer(x, *w, op=dist.ReduceOp.MAX), *weights(mesh)))


def test_a_sum_over_another_group_is_none(mesh):
    other = dist.new_group([0])
    with pytest.raises(ranks.Unknown):
        group_of(attention(lambda x, *w: layer(x, *w, group=other), *weights(mesh)))


def test_a_sum_over_another_group_anywhere_in_the_graph(mesh):
    other = dist.new_group([0])

    def then(x, *w):
        y = layer(x, *w)
        dist.all_reduce(y, group=other)
        return y

    with pytest.raises(ranks.Unknown):
        group_of(attention(then, *weights(mesh)))


def test_heads_of_one_rank_whose_output_is_shared(mesh):
    with pytest.raises(ranks.Unknown):
        group_of(attention(layer, *weights(mesh, Replicate())))


def test_parts_of_other_sizes(mesh):
    wq, wk, wv, wo = weights(mesh)
    wq = spread(mesh, WIDTH, WIDTH, on=Shard(0), whole=(2 * WIDTH - 1, WIDTH))
    with pytest.raises(ranks.Unknown):
        group_of(attention(layer, wq, wk, wv, wo))


def test_what_is_traced_with_gradients_is_not_known(mesh):
    (found,), _ = read_all(graph_of(no_sum, X, *weights(mesh), gradients=True).graph)
    assert shared(found, Policy()) == (None, ranks.UNKNOWN)
