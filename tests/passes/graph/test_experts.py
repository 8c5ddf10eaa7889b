"""A call of experts runs its operations, for any number of tokens."""

import torch
from torch.fx import Graph

from zipvl_compile.passes.graph.experts import RoutedExperts
from zipvl_compile.passes.graph.op_kinds import Tokens
from zipvl_compile.passes.graph.op_traits import of_target


def doubled():
    """`x.view(n, C)` of a tensor `[n, C]`, each row K times."""
    graph = Graph()
    x, rows, pairs, weight = (graph.placeholder(name) for name in ("x", "tokens", "pairs", "weight"))
    count = graph.call_function(torch.full, ((pairs,), 1.0))
    each = graph.call_method("view", (count, rows, 2))
    graph.output(
        graph.call_function(
            torch.mul,
            (
                graph.call_method("unsqueeze", (x, 1)),
                graph.call_function(torch.mul, (graph.call_method("unsqueeze", (each, -1)), weight)),
            ),
        )
    )
    return RoutedExperts(graph, tokens=1, experts=2)


def test_it_is_given_how_many_tokens_and_pairs_there_are():
    call = doubled()
    for n in (3, 5):
        x = torch.randn(n, 4)
        assert torch.equal(call(x, torch.tensor(3.0)), 3 * x[:, None].expand(n, 2, 4))


def test_it_is_known_to_the_table():
    op = of_target(doubled())
    assert op.name == "routed_experts" and op.tokens is Tokens.EXPERTS and not op.writes and not op.view
