"""Which operations belong to a mixture of experts, and where its tokens may meet."""

import pytest
import torch
from support.experts import EXPERTS, TAKEN, WEIGHTS, WIDTH, N, X, back, ends_of, expert, graph_of, mixture, route

from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.expert_order import Rows, find


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def found(function, *inputs):
    """Return the mixture that the first sort of a function belongs to."""
    return find(next(node for node in graph_of(function, *inputs).graph.nodes if is_op(node, "sort", "argsort")))


def test_the_mixture_names_what_it_reads_of_each_token():
    mixed = found(mixture, X, *WEIGHTS)
    assert mixed.experts == TAKEN and mixed.pairs == N * TAKEN and mixed.tokens[0] is mixed.ids
    assert [tuple(x.meta["example_value"].shape) for x in mixed.tokens] == [(N, TAKEN), (N, WIDTH), (N, TAKEN)]
    assert tuple(mixed.result.meta["example_value"].shape) == (N, TAKEN, WIDTH)
    assert set(Rows) == set(mixed.nodes.values())


def half_back(order):
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0]) // 2
    return places


def written_twice(order):
    places = back(order)
    places[0] = 1
    return places


def rows_of_next(x, router, up, down):
    ids, values = route(x, router)
    by_expert, order = torch.sort(ids.reshape(-1))
    rows = expert(x[order.flip(0) // TAKEN], ends_of(by_expert), up, down)
    return (rows[back(order)].view(-1, TAKEN, WIDTH) * values[..., None]).sum(1)


def also_read(x, router, up, down):
    ids, _ = route(x, router)
    by_expert, order = torch.sort(ids.reshape(-1))
    rows = expert(x[order // TAKEN], ends_of(by_expert), up, down)
    return rows[back(order)].view(-1, TAKEN, WIDTH).sum(1) + rows.mean()


def too_few_bins(x, router, up, down):
    ids, values = route(x, router)
    by_expert, order = torch.sort(ids.reshape(-1))
    counts = torch.histc(by_expert.float(), bins=EXPERTS, min=0, max=EXPERTS)
    rows = expert(x[order // TAKEN], torch.cumsum(counts, 0, dtype=torch.int32), up, down)
    return (rows[back(order)].view(-1, TAKEN, WIDTH) * values[..., None]).sum(1)


def greatest_first(x, router, up, down):
    """The runs of a grouped product begin with expert 0: which one a row meets depends on how many others there are."""
    ids, values = route(x, router)
    by_expert, order = torch.sort(ids.reshape(-1), descending=True)
    rows = expert(x[order // TAKEN], ends_of(by_expert), up, down)
    return (rows[back(order)].view(-1, TAKEN, WIDTH) * values[..., None]).sum(1)


def by_weight(x, router, up, down):
    """Counts leave out numbers below 0, so that the runs would end elsewhere for other tokens."""
    _, values = route(x, router)
    sorted_, order = torch.sort((4 * values - 1).reshape(-1))
    rows = expert(x[order // TAKEN], ends_of(sorted_), up, down)
    return rows[back(order)].view(-1, TAKEN, WIDTH).sum(1)


def two_orders(x, router, up, down):
    ids, values = route(x, router)
    flat = ids.reshape(-1)
    by_expert, order = torch.sort(flat)
    rows = expert(x[order // TAKEN], ends_of(by_expert), up, down)
    return (rows[back(torch.argsort(values.reshape(-1)))].view(-1, TAKEN, WIDTH)).sum(1)


def sorted_again(x, router, up, down):
    """Equal ids may come in another order."""
    ids, values = route(x, router)
    flat = ids.reshape(-1)
    by_expert, order = torch.sort(flat)
    rows = expert(x[order // TAKEN], ends_of(by_expert), up, down)
    return (rows[back(torch.argsort(flat))].view(-1, TAKEN, WIDTH) * values[..., None]).sum(1)


MIXING = {
    "sorted by weight": by_weight,
    "two orders": two_orders,
    "sorted again": sorted_again,
    "the greatest expert first": greatest_first,
    "an inverse turned over": lambda *x: mixture(*x, undo=lambda order: order.argsort(descending=True)),
    "rows added up": lambda *x: mixture(*x, inside=lambda rows: rows.cumsum(0)),
    "a norm over rows": lambda *x: mixture(*x, inside=lambda rows: rows.softmax(0)),
    "rows of another token": rows_of_next,
    "another way back": lambda *x: mixture(*x, undo=half_back),
    "no way back": lambda *x: mixture(*x, undo=lambda order: order),
    "a way back that is changed": lambda *x: mixture(*x, undo=written_twice),
    "sorted rows that others read": also_read,
    "bins of no expert": too_few_bins,
    "rows turned over": lambda *x: mixture(*x, inside=lambda rows: rows.flip(0)),
}


@pytest.mark.parametrize("name", MIXING)
def test_where_tokens_may_meet_there_is_none(name):
    with pytest.raises(Mixes):
        found(MIXING[name], X, *WEIGHTS)


def test_what_is_sorted_otherwise_is_no_mixture():
    with pytest.raises(Mixes, match="no experts are sorted"):
        found(lambda x: x.sort(-1)[0] + x.argsort(0), X)
