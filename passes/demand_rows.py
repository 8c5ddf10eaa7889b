"""Only some rows of the last hidden state are used: the last layer computes no others.

Before (`logits_to_keep=1`, as `generate` calls every model):

    a = sparse_attention(q, keys, values, positions, ...)                       n tokens
    h = x + linear(a, wo)
    logits = linear(norm(h + mlp(norm(h)))[:, -1:], lm_head)

After:

    a_1 = decode_attention(q[:, :, -1:], keys, values, positions, n, n, ...)    one token; zero if it was not kept
        | window_attention(q[:, :, -1:], ..., queries="all")                    where it sees its window, too
        | scaled_dot_product_attention(q[:, :, -1:], k, v)                      where the layer stays dense
    h_1 = x[:, -1:] + linear(a_1, wo)
    logits = linear(norm(h_1 + mlp(norm(h_1))), lm_head)

Exact: everything between is proven to treat each token by itself and to be read by nothing else
(`tokenwise/sole_readers.py`). Keys and values of the last layer are still those of the prompt. Q is narrowed to the
last row here, or to the probe rows and the last one by `prune_projections`. Other slices than the last row, and indices
that are tensors, leave the attention as it is.

Where the graph returns the last hidden state, and those who get it read the newest row alone (`read_demands`), as after
the graph break between most vision-language models and their head, the other rows are returned as NaN: whoever reads
them all the same cannot fail to see it.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import erase_unread, insert_call, size, undone_on_error
from zipvl_compile.passes.graph.graph import replace as replace_node
from zipvl_compile.passes.graph.op_calls import SparseAttentionCall, WindowAttentionCall
from zipvl_compile.passes.graph.reading import arguments, example, is_op
from zipvl_compile.passes.match.outcome import Demand
from zipvl_compile.passes.match.reasons import fault
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.prefill.last_row import LAST, attend_last
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes, every_axis
from zipvl_compile.passes.tokenwise.backward_slice import Cone
from zipvl_compile.passes.tokenwise.row_select import Slice, one_sample
from zipvl_compile.passes.tokenwise.sole_readers import computed_only_for


@dataclass(frozen=True)
class Part:
    """Reads rows `index` of a hidden state `[B, n, hidden]`: an int, a slice, or an int64 tensor `[m]`."""

    reader: Node
    hidden: Node
    index: Any


def find(graph: Graph) -> list[Part]:
    """Return the parts of hidden states that are taken after an attention, in execution order."""
    found, below = [], {node for node in graph.nodes if _is_attention(node)}
    for node in graph.nodes:
        if below.isdisjoint(node.all_input_nodes):
            continue
        below.add(node)
        if is_op(node, "getitem") and (part := read_part(node)) is not None:
            found.append(part)
    return found


def _is_attention(node: Node) -> bool:
    ours = SparseAttentionCall.matches(node) or WindowAttentionCall.matches(node)
    return ours or is_op(node, "scaled_dot_product_attention")


def read_part(node: Node) -> Part | None:
    """Return which rows of a tensor `[B, n, hidden]` an indexing takes; None where it takes all, or something else."""
    given = arguments(node)
    hidden, index = given["input"], given["index"]
    value = example(hidden)
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not isinstance(index, tuple):
        return None
    if any(i is None or isinstance(i, bool) for i in index) or len(index) - (Ellipsis in index) > 3:
        return None
    samples, tokens, features = every_axis(index, 3)
    if (samples, features) != (slice(None), slice(None)) or tokens == slice(None):
        return None
    if isinstance(tokens, slice) and statically_known_true(example(node).shape[1] == value.shape[1]):
        return None  # all of them
    indexed = isinstance(tokens, Node)
    if indexed and (not isinstance(example(tokens), torch.Tensor) or example(tokens).dtype != torch.int64):
        return None
    if indexed and example(tokens).dim() != 1:
        return None
    return Part(node, hidden, tokens)


def rewrite(part: Part, sites: Sites) -> None:
    """Compute the demanded rows only.

    Raises:
        Mixes: other rows are needed, or rows are not known to be computed token by token.
    """
    cone = computed_only_for(part.hidden, Axes(1, None if one_sample(part.hidden) else 0), {part.reader})
    one = isinstance(part.index, int)
    index = slice(part.index, part.index + 1 or None) if one else part.index
    rows, reader = Slice(index), part.reader
    taken, last = {}, {}
    for source, axes in cone.sources.items():
        if index == LAST and axes.token == 2 and (row := attend_last(source, reader)) is not None:
            taken[source], last[source] = row
        else:
            taken[source] = rows.take(source, axes, reader)
    first = next(iter(cone.sources))
    new = cone.again(taken, size(taken[first], cone.sources[first].token, reader), reader)[part.hidden]
    if one:
        new = insert_call(reader, operator.getitem, (new, (slice(None), 0)))
    replace_node(reader, new)
    erase_unread([reader])
    cone.erase()
    for source, attention in last.items():
        if (site := sites.at(source)) is not None:
            site.node = attention
        erase_unread([source])
        if is_op(attention, "scaled_dot_product_attention"):
            with contextlib.suppress(Mixes):  # exact all the same
                narrow_query(arguments(attention)["query"], Axes(2), set()).erase()


def narrow_returned(hidden: Node, sites: Sites) -> None:
    """Compute the newest row alone of a hidden state `[B, n, hidden]` that the graph returns, and NaN for the others.

    Raises:
        Mixes: as `rewrite` does.
    """
    output, key = hidden.graph.output_node(), sites.prefill[0].attention.key
    row = insert_call(output, operator.getitem, (hidden, (slice(None), LAST)))
    n = size(key, 2, output)
    others = n - 1 if isinstance(n, int) else insert_call(output, operator.sub, (n, 1))
    sizes = [size(key, 0, output), others, example(hidden).shape[2]]
    nothing = insert_call(output, torch.ops.aten.new_full.default, (row, sizes, math.nan))
    whole = insert_call(output, torch.cat, ((nothing, row), 1))
    output.replace_input_with(hidden, whole)
    try:
        rewrite(Part(row, hidden, LAST), sites)
    except Exception:
        output.replace_input_with(whole, hidden)
        raise


def narrow_query(part: Node, axes: Axes, readers: set[Node]) -> Cone:
    """Compute Q for the rows `part = q[:, :, rows]` only.

    Args:
        axes: of q.
        readers: who else reads q, and will not in the end.

    Returns:
        What computes q in full, which only `readers` still need.

    Raises:
        Mixes: Q is needed in full, or not known to be computed token by token.
    """
    given = arguments(part)
    query, index = given["input"], given["index"]
    cone = computed_only_for(query, axes, {part, *readers})
    rows = Slice(index[-1])
    taken = {source: rows.take(source, axes, part) for source, axes in cone.sources.items()}
    replace_node(part, cone.again(taken, size(part, 2, part), part)[query])
    erase_unread([part])
    return cone


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Narrow what is computed for rows of the last hidden state that nobody uses."""
    for part in find(graph):
        _try(graph, sites, part.index, part.reader, lambda part=part: rewrite(part, sites))  # type: ignore[misc]
    hidden = sites.demanded.returned
    if hidden is not None and not hidden._erased:
        _try(graph, sites, LAST, hidden, lambda: narrow_returned(hidden, sites))


def _try(graph: Graph, sites: Sites, index: Any, reader: Node, narrow: Callable[[], None]) -> None:
    """Narrow some rows, and note why they were not."""
    reason = ""
    try:
        with undone_on_error(graph):
            narrow()
    except Mixes as why:
        reason = str(why)
    except Exception as error:  # a fault of ours must not break the user's compile
        if reader._erased:  # too late to undo it here
            raise
        reason = str(fault(error))
    sites.demands.append(Demand(str(index), reason))
