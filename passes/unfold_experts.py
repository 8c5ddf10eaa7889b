"""The operations of mixtures of experts in the place of the calls that `fold_experts` made of them.

For as many tokens as the passes in between have left:

    routed_experts(hidden[kept], ids[kept], weights[kept], gate_up, down)   ->   sort, grouped products, and back
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from zipvl_compile.passes.graph.experts import RoutedExperts
from zipvl_compile.passes.graph.graph import insert_call, propagate, replace
from zipvl_compile.passes.graph.private import fake_mode_of
from zipvl_compile.passes.graph.reading import example, is_op
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Put the operations of each mixture in the place of its call."""
    for node in [node for node in graph.nodes if is_op(node, "routed_experts")]:
        call = node.target
        assert isinstance(call, RoutedExperts)
        mode = fake_mode_of([example(node)])
        given = [*node.args[: call.tokens], *_sizes(node, call.experts), *node.args[call.tokens :]]
        new: dict[Node, Any] = dict(zip(call.graph.find_nodes(op="placeholder"), given, strict=True))
        for inner in call.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                with graph.inserting_before(node):
                    new[inner] = graph.node_copy(inner, new.__getitem__)
                propagate(new[inner], mode)
        (result,) = call.graph.output_node().all_input_nodes
        replace(node, new[result])
        graph.erase_node(node)


def _sizes(before: Node, experts: int) -> tuple[Any, Any]:
    """Return how many tokens, and pairs with an expert, a call has: numbers, or nodes before it."""
    first = before.args[0]
    if isinstance(count := example(first).shape[0], int):
        return count, count * experts
    rows = insert_call(before, torch.ops.aten.sym_size.int, (first, 0))
    return rows, insert_call(before, operator.mul, (rows, experts))
