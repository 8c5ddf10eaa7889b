"""Mixtures of experts as calls that treat each token by itself.

A model sorts its tokens by expert, multiplies each run of rows with the weights of its expert, and sorts back. Rows are
moved about in a way that a rule for single operations cannot see through, so one call is made of it, once it is
proven that tokens do not meet in it (`tokenwise/expert_order.py`):

    sorted, order = sort(ids.reshape(-1))
    rows = grouped_mm(hidden[order // K], w, offs=cumsum(histc(sorted)))     ->     routed_experts(hidden, ids, w)
    rows[back].view(n, K, C)

The router's own calls in place (`weights /= weights.sum()`) are made to return other tensors, where nobody can tell.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from zipvl_compile.passes.graph import out_of_place
from zipvl_compile.passes.graph.experts import RoutedExperts
from zipvl_compile.passes.graph.graph import insert_call, replace
from zipvl_compile.passes.graph.reading import example, is_op
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.axis_rules import SIZED, Mixes
from zipvl_compile.passes.tokenwise.expert_order import Mixture, find

COUNTED = (*SIZED, "arange", "unflatten")  # calls that may name how many tokens or pairs there are


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Make one call of each mixture of experts in a prompt's graph that is known to treat each token by itself."""
    if _found(graph):
        out_of_place.rewrite(list(graph.nodes))
    for mixture in _found(graph):
        _fold(mixture)


def _found(graph: Graph) -> list[Mixture]:
    found = []
    for sort in [node for node in graph.nodes if is_op(node, "sort", "argsort")]:
        with contextlib.suppress(Mixes):
            found.append(find(sort))
    # Of a single token there is nothing to leave out.
    return [one for one in found if not statically_known_true(example(one.ids).shape[0] == 1)]


def _fold(mixture: Mixture) -> None:
    assert mixture.result is not None
    inside, inner = sorted(mixture.nodes), Graph()
    new = {x: inner.placeholder(x.name) for x in mixture.tokens}
    rows, pairs = inner.placeholder("tokens"), inner.placeholder("pairs")
    last, others = pairs, list[Node]()

    def take(x: Node) -> Node:
        """Return what stands for a node; one from outside becomes an input."""
        nonlocal last
        if x not in new:
            with inner.inserting_after(last):
                last = new[x] = inner.placeholder(x.name)
            others.append(x)
        return new[x]

    for node in inside:
        args = _counted(node, mixture, rows, pairs)
        copy = inner.node_copy(node, lambda _: rows)
        copy.args = map_arg(args, lambda x: x if x.graph is inner else take(x))
        copy.kwargs = map_arg(node.kwargs, take)
        new[node] = copy
    inner.output(new[mixture.result])
    call = RoutedExperts(inner, len(mixture.tokens), mixture.experts)
    replace(mixture.result, insert_call(mixture.result, call, (*mixture.tokens, *others)))
    for node in reversed(inside):
        node.graph.erase_node(node)


def _counted(node: Node, mixture: Mixture, rows: Node, pairs: Node) -> tuple[Any, ...]:
    """Return the arguments of a call, with the inner graph's own where it names how many tokens or pairs there are."""
    if not is_op(node, *COUNTED):
        return node.args
    place = 0 if is_op(node, "arange") else len(node.args) - 1 if is_op(node, "unflatten") else 1
    nested = isinstance(node.args[place], (tuple, list))
    first, *rest = node.args[place] if nested else node.args[place:]  # type: ignore[misc]
    if statically_known_true(example(first) == mixture.pairs):
        first = pairs
    elif statically_known_true(example(first) == example(mixture.ids).shape[0]):
        first = rows
    sizes = ((first, *rest),) if nested else (first, *rest)
    return (*node.args[:place], *sizes)
