"""Only some rows of the last hidden state are used: the last layer computes no others.

Before (`logits_to_keep=1`, as `generate` calls every model):

    a = sparse_attention(q, keys, values, positions, ...)                       n tokens
    h = x + linear(a, wo)
    logits = linear(norm(h + mlp(norm(h)))[:, -1:], lm_head)

After:

    a_1 = decode_attention(q[:, :, -1:], keys, values, positions, n, n, ...)    one token; zero if it was not kept
        | scaled_dot_product_attention(q[:, :, -1:], k, v)                      where the layer stays dense
    h_1 = x[:, -1:] + linear(a_1, wo)
    logits = linear(norm(h_1 + mlp(norm(h_1))), lm_head)

Exact: everything between is proven to treat each token by itself and to be read by nothing else
(`exclusive_rows.py`). Keys and values of the last layer are still those of the prompt. Q is narrowed to the last row
here, or to the probe rows and the last one by `prune_projections`. Other slices than the last row, and indices that are
tensors, leave the attention as it is.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.kernels import decode_attention as _decode  # noqa: F401  (registers the operators)
from zipvl_compile.kernels import sparse_attention as _attend  # noqa: F401
from zipvl_compile.passes.graph.graph import args_of, arguments, calls, erase_unread, example, insert_call, is_call
from zipvl_compile.passes.match.outcome import Demand, PassReport
from zipvl_compile.passes.match.sdpa import SDPA, SDPA_ARGUMENTS
from zipvl_compile.passes.tokenwise.axis_rules import Mixes, every_axis
from zipvl_compile.passes.tokenwise.backward_slice import Axes, Cone
from zipvl_compile.passes.tokenwise.row_select import Slice, size
from zipvl_compile.passes.tokenwise.sole_readers import computed_only_for, under_autocast

ops = torch.ops.zipvl
LAST = slice(-1, None, None)
_RECENT = 6  # which argument of token_scores


@dataclass(frozen=True)
class Part:
    """Reads rows `index` of a hidden state `[B, n, hidden]`: an int, a slice, or an int64 tensor `[m]`."""

    reader: Node
    hidden: Node
    index: Any


def find(graph: Graph) -> list[Part]:
    """Return the parts of hidden states that are taken after an attention, in execution order."""
    found, below = [], {*calls(graph, ops.sparse_attention), *calls(graph, SDPA)}
    for node in graph.nodes:
        if below.isdisjoint(node.all_input_nodes):
            continue
        below.add(node)
        if is_call(node, operator.getitem) and (part := _read(node)) is not None:
            found.append(part)
    return found


def _read(node: Node) -> Part | None:
    hidden, index = args_of(node)
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


def rewrite(part: Part) -> None:
    """Compute the demanded rows only.

    Raises:
        Mixes: other rows are needed, or rows are not known to be computed token by token.
    """
    cone = computed_only_for(part.hidden, Axes(1), {part.reader})
    one = isinstance(part.index, int)
    index = slice(part.index, part.index + 1 or None) if one else part.index
    rows, reader = Slice(index), part.reader
    taken = {}
    for source, axes in cone.sources.items():
        attend = None if index != LAST or axes.token != 2 else _LAST_OF.get(source.target)
        taken[source] = (attend and attend(source, reader)) or rows.take(source, axes, reader)
    first = next(iter(cone.sources))
    new = cone.again(taken, size(taken[first], cone.sources[first].token, reader), reader)[part.hidden]
    if one:
        new = insert_call(reader, operator.getitem, (new, (slice(None), 0)))
    reader.replace_all_uses_with(new)
    erase_unread([reader])
    cone.erase()
    erase_unread(source for source in cone.sources if source.target in _LAST_OF)
    for source, last in taken.items():
        if is_call(source, SDPA) and is_call(last, SDPA):
            with contextlib.suppress(Mixes):  # exact all the same
                narrow_query(args_of(last)[0], Axes(2), set()).erase()


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
    query, index = args_of(part)
    cone = computed_only_for(query, axes, {part, *readers})
    rows = Slice(index[-1])
    taken = {source: rows.take(source, axes, part) for source, axes in cone.sources.items()}
    part.replace_all_uses_with(cone.again(taken, size(part, 2, part), part)[query])
    erase_unread([part])
    return cone


def attend_last_of_all(attention: Node, before: Node) -> Node | None:
    """Insert the last row `[B, Hq, 1, Dv]` of a dense attention before a node; None where it cannot be told."""
    if attention in under_autocast(attention.graph):
        return None
    given = arguments(attention, *SDPA_ARGUMENTS)
    query, key, value, mask = (given.get(name) for name in SDPA_ARGUMENTS[:4])
    shapes = [example(x).shape for x in (query, key)]
    if given.get("is_causal") and not statically_known_true(shapes[0][-2] == shapes[1][-2]):
        return None
    if mask is not None and not statically_known_true(example(mask).shape[-2] == 1):
        mask = insert_call(before, operator.getitem, (mask, (Ellipsis, LAST, slice(None))))
    last = insert_call(before, operator.getitem, (query, (slice(None), slice(None), LAST)))
    others = {name: given[name] for name in SDPA_ARGUMENTS[4:] if name in given and name != "is_causal"}
    return insert_call(before, SDPA, (last, key, value, mask), others)  # it sees every key: no causal mask


def attend_last(attention: Node, before: Node) -> Node:
    """Insert the last row `[B, Hq, 1, Dv]` of a sparse attention before a node."""
    query, keys, values, positions, mask, _, scale, softcap, queries = args_of(attention)
    scores = args_of(args_of(positions)[0])[0]
    scored_keys = args_of(scores)[1]  # [B, Hkv, n, D]
    n = size(scored_keys, 2, before)
    mask = args_of(mask)[0] if is_call(mask, ops.hiding_rows) else mask  # decoding reads the padding row itself
    if mask is not None and not statically_known_true(example(mask).shape[2] == 1):
        mask = insert_call(before, operator.getitem, (mask, (slice(None), slice(None), LAST)))
    last = insert_call(before, operator.getitem, (query, (slice(None), slice(None), LAST)))
    # The last row sees every kept key, as a new token sees the cache.
    arguments = (last, keys, values, positions, n, n, mask, scale, softcap)
    out = insert_call(before, ops.decode_attention.default, arguments)
    out.meta["layer"] = attention.meta.get("layer")
    if queries == "all" or (mask is None and has_last_row(scores)):
        return out  # the newest visible token is always kept
    at = n - 1 if isinstance(n, int) else insert_call(before, operator.sub, (n, 1))
    kept = insert_call(before, torch.any, (insert_call(before, operator.eq, (positions, at)), 2))  # [B, 1]
    kept = insert_call(before, operator.getitem, (kept, (Ellipsis, None, None)))
    return insert_call(before, torch.where, (kept, out, 0.0))


def has_last_row(scores: Node) -> bool:
    """Return whether the last row is among the probe rows, the last of them, so that one row sees the last token."""
    return args_of(scores)[_RECENT] > 0


_LAST_OF: dict[Any, Callable[[Node, Node], Node | None]] = {
    ops.sparse_attention.default: attend_last, SDPA: attend_last_of_all,
}  # fmt: skip


def apply(graph: Graph) -> PassReport:
    """Narrow what is computed for rows of the last hidden state that nobody uses."""
    report = PassReport("demand_rows")
    for part in find(graph):
        reason = ""
        try:
            rewrite(part)
        except Mixes as why:
            reason = str(why)
        report.demands.append(Demand(str(part.index), reason))
    return report
