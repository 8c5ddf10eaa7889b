"""The input of a graph that holds the numbers of a budget."""

import torch
from torch.fx import Graph

from zipvl_compile.passes.prefill.selection import BUDGET, LAYERS, budget_input


def test_the_budget_is_one_last_input():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    x.meta["example_value"] = torch.ones(2)
    graph.output(graph.call_function(torch.add, (x, y)))
    budget = budget_input(graph, x, (0, 5))
    assert budget is budget_input(graph, x, (0, 5))
    assert [node.target for node in graph.find_nodes(op="placeholder")] == ["x", "y", BUDGET]
    assert budget.meta["example_value"].shape == (2, 4) and budget.meta["example_value"].dtype == torch.float64
    assert budget.meta[LAYERS] == (0, 5)
    graph.lint()
