"""Which rows of the last hidden state are read: their logits must be worth reading, so they are kept and attend.

    logits = lm_head(norm(x)[:, -1:])                 generate: the newest row, which is always kept
    logits = lm_head(norm(x)[:, -12:])                assisted decoding, scoring: the 12 newest rows
    logits = lm_head(norm(x)[:, rows])                ranking: the rows of an index tensor
    logits = lm_head(norm(x))                         perplexity, labels: every row
    return norm(x)                                    every row, unless the frames that called the graph say otherwise

It changes nothing but `sites.demanded`, which `sparsify_prefill` obeys. From every attention of the prefill it follows
what is computed of its output, up to where rows of a hidden state are taken and up to the outputs of the graph. Keys,
values and caches are left out: what a later layer does with them is in that layer's output. Where something else of all
rows leaves the graph, or rows cannot be told, all of them count as read.

A graph break between the decoder and its head, as in `generate` of most vision-language models, makes the hidden state
an output of the graph. Then `settings.newest_rows_read` is asked.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from zipvl_compile.passes.demand_rows import Part, read_part
from zipvl_compile.passes.graph.graph import insert_call, size
from zipvl_compile.passes.graph.op_calls import GatherTokensCall, TokenPositionsCall
from zipvl_compile.passes.graph.reading import (
    changed_in_place,
    example,
    is_op,
    is_pure,
    memory_of,
    same_shape,
    spelled,
    written,
)
from zipvl_compile.passes.match.outcome import Demanded
from zipvl_compile.passes.match.reasons import fault
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.prefill.last_row import LAST
from zipvl_compile.passes.prefill.refusals import number_of
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.backward_slice import reads_size
from zipvl_compile.passes.tokenwise.row_select import token_positions


class Untold(Exception):
    """Rows are read of which the graph does not say early enough which they are."""


def find(graph: Graph, sites: Sites) -> tuple[list[Part], list[Node]]:
    """Return the parts of hidden states that are taken after an attention, and what else of them leaves the graph."""
    attentions = {site.attention.node for site in sites.prefill}
    stored = {x for site in sites for x in (site.attention.key, site.attention.value, *site.attention.inputs)}
    n = example(sites.prefill[0].attention.key).shape[2]
    below: set[Node] = set()
    parts: list[Part] = []
    for node in graph.nodes:
        if node.op == "output":
            return parts, [x for x in node.all_input_nodes if x in below]
        if node in attentions:
            below.add(node)
        if below.isdisjoint(node.all_input_nodes) or node in stored or _fills_a_cache(node) or reads_size(node):
            continue
        if is_op(node, "getitem") and (part := read_part(node)) is not None and _by_row(part, n, below):
            parts.append(part)
            continue
        below.add(node)
        for tensor in written(node):
            below |= memory_of(tensor)
    return parts, []


def _by_row(part: Part, n: Any, below: set[Node]) -> bool:
    """Return whether a part takes tokens of the prompt, and not those that a router sends to an expert."""
    of_data = isinstance(part.index, Node) and part.index in below
    return not of_data and statically_known_true(example(part.hidden).shape[1] == n)


def _fills_a_cache(node: Node) -> bool:
    return GatherTokensCall.matches(node) or TokenPositionsCall.matches(node)


def is_hidden_state(x: Node, sites: Sites) -> bool:
    """Return whether an output may be a hidden state `[B, n, hidden]`."""
    value, n = example(x), example(sites.prefill[0].attention.key).shape[2]
    return isinstance(value, torch.Tensor) and value.dim() == 3 and statically_known_true(value.shape[1] == n)


def demanded(graph: Graph, sites: Sites, settings: Settings) -> Demanded:
    """Return the rows that are read after the last layer, with nodes that stand before the first attention."""
    parts, leaving = find(graph, sites)
    newest: list[Any] = [1]
    if leaving:
        only = len(leaving) == 1 and is_hidden_state(leaving[0], sites)
        newest.append(settings.newest_rows_read() if only else 0)
        if not newest[-1]:
            names = ", ".join(sorted({spelled(x) for x in leaving}))
            return Demanded(every=f"all rows of the hidden state are read (the graph returns the result of {names})")
    first = min(site.attention.node for site in sites.prefill)
    others: list[Node] = []
    try:
        for part in parts:
            _add(part, newest, others, sites.prefill[0].attention.key, first)
    except Untold as why:
        return Demanded(every=str(why))
    numbers, nodes = [x for x in newest if isinstance(x, int)], [x for x in newest if isinstance(x, Node)]
    most: Any = max(numbers)
    for node in nodes:
        most = node if most == 1 else insert_call(first, torch.sym_max, (node, most))
    text = [f"slice({-rows}, None, None)" for rows in newest[1:2] if leaving and rows > 1]
    text += [str(part.index) for part in parts if part.index not in (-1, LAST)]
    alone = newest == [1, 1] and bool(leaving) and is_last_hidden_state(leaving[0], sites, settings)
    return Demanded(most, tuple(others), text=tuple(text), returned=leaving[0] if alone else None)


def is_last_hidden_state(hidden: Node, sites: Sites, settings: Settings) -> bool:
    """Return whether a hidden state that a graph returns is known to be that of the decoder's last layer, for its head.

    A decoder that is asked for hidden states returns those of all its layers; they have the same shape.
    """
    shape = example(hidden).shape
    values = [example(x) for x in hidden.graph.output_node().all_input_nodes if x is not hidden]
    alike = any(isinstance(x, torch.Tensor) and same_shape(x.shape, shape) for x in values)
    number = number_of(sites.prefill[-1].name, -1)
    return not alike and number > 0 and settings.decoder_layers() == number + 1


def _add(part: Part, newest: list[Any], others: list[Node], key: Node, before: Node) -> None:
    """Add the rows of one part to the numbers of newest rows, or to the positions of others.

    Raises:
        Untold: they depend on what stands after the first attention, or are nearly all rows of a long prompt.
    """
    index = part.index
    if isinstance(index, Node):
        others.append(available(index, before))
    elif isinstance(index, slice):
        (newest if _is_tail(index) else others).append(_rows_of(index, key, before))
    elif index < 0:
        newest.append(-index)
    else:
        others.append(token_positions(key, slice(index, index + 1), before))


def _is_tail(rows: slice) -> bool:
    return rows.stop is None and rows.step in (None, 1)


def _rows_of(rows: slice, key: Node, before: Node) -> Any:
    """Return how many newest rows a slice takes, or the positions of its rows where they are not the newest."""
    if not _is_tail(rows):
        start, stop = rows.start or 0, rows.stop
        bounded = isinstance(start, int) and isinstance(stop, int) and (start < 0) == (stop < 0)
        if not bounded:
            raise Untold(f"rows {rows} are read, whose number grows with the prompt")
        return token_positions(key, rows, before)
    if isinstance(rows.start, int) and rows.start < 0:
        return -rows.start
    if not isinstance(rows.start, Node):
        raise Untold(f"rows {rows} are read, whose number grows with the prompt")
    start = available(rows.start, before)
    if statically_known_true(example(start) < 0):
        return insert_call(before, operator.neg, (start,))
    if statically_known_true(example(start) >= 0):
        return insert_call(before, operator.sub, (size(key, 2, before), start))
    raise Untold(f"rows {rows} are read, and whether they are counted from the end is not known")


def available(node: Node, before: Node) -> Node:
    """Return a node that stands before another one, or a copy of it there.

    Raises:
        Untold: it cannot be computed there.
    """
    if node < before:
        if example(node) is not None and isinstance(example(node), torch.Tensor) and changed_in_place(node):
            raise Untold("the rows that are read are changed in place")
        return node
    if not is_pure(node) or changed_in_place(node):
        raise Untold(f"the rows that are read come from {spelled(node)!r} after the first attention")
    args = map_arg(node.args, lambda x: available(x, before))
    kwargs = map_arg(node.kwargs, lambda x: available(x, before))
    if node.op != "call_function":
        raise Untold(f"the rows that are read come from {spelled(node)!r} after the first attention")
    return insert_call(before, node.target, args, kwargs)  # type: ignore[arg-type]


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Note which rows are read; where anything fails, every row counts as read."""
    if not sites.prefill:
        return
    try:
        sites.demanded = demanded(graph, sites, settings)
    except Exception as error:  # a fault of ours must not break the user's compile
        sites.demanded = Demanded(every=str(fault(error)))
