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
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import erase_unread, insert_call, undone_on_error
from zipvl_compile.passes.graph.graph import replace as replace_node
from zipvl_compile.passes.graph.op_calls import (
    DecodeAttentionCall,
    HidingRowsCall,
    SelectTokensCall,
    SparseAttentionCall,
    TokenScoresCall,
    WindowAttentionCall,
)
from zipvl_compile.passes.graph.reading import arguments, example, is_op
from zipvl_compile.passes.match.outcome import Demand
from zipvl_compile.passes.match.reasons import fault
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.axis_rules import Mixes, every_axis
from zipvl_compile.passes.tokenwise.backward_slice import Axes, Cone
from zipvl_compile.passes.tokenwise.row_select import Slice, size
from zipvl_compile.passes.tokenwise.sole_readers import computed_only_for, under_autocast

LAST = slice(-1, None, None)


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
    cone = computed_only_for(part.hidden, Axes(1), {part.reader})
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


def attend_last(attention: Node, before: Node) -> tuple[Node, Node] | None:
    """Insert the last row of an attention before a node.

    Returns:
        The row `[B, Hq, 1, Dv]` and the attention that gives it; None where it is none, or cannot be told.
    """
    if SparseAttentionCall.matches(attention):
        call = SparseAttentionCall.read(attention)
        return attend_last_kept(call, call.k, call.v, call.queries, before)
    if WindowAttentionCall.matches(attention):
        window = WindowAttentionCall.read(attention)
        if window.kept_window:
            return attend_last_to_window(window, before)
        return attend_last_kept(window, window.kept_k, window.kept_v, "window", before)
    row = attend_last_of_all(attention, before) if is_op(attention, "scaled_dot_product_attention") else None
    return None if row is None else (row, row)


def attend_last_to_window(attention: WindowAttentionCall, before: Node) -> tuple[Node, Node]:
    """Insert the last row `[B, Hq, 1, Dv]` of an attention whose kept rows see their window, too.

    Returns:
        The row, and the attention that gives it where the last token is kept.
    """
    scores = SelectTokensCall.read(attention.positions).scores
    last = insert_call(before, operator.getitem, (attention.q, (slice(None), slice(None), LAST)))
    out = replace(attention, q=last, queries="all").insert(before)
    if attention.queries == "all" or (attention.mask is None and has_last_row(scores)):
        return out, out
    none = (slice(None), slice(None), slice(0))
    keys, values, positions = (
        insert_call(before, operator.getitem, (x, none))
        for x in (attention.kept_k, attention.kept_v, attention.positions)
    )
    alone = replace(attention, q=last, queries="all", kept_k=keys, kept_v=values, positions=positions).insert(before)
    return insert_call(before, torch.where, (last_is_kept(attention.positions, scores, before), out, alone)), out


def last_is_kept(positions: Node, scores: TokenScoresCall, before: Node) -> Node:
    """Insert whether the last token of the prompt is kept, bool `[B, 1 or Hq, 1, 1]`."""
    n, groups = size(scores.k, 2, before), example(positions).shape[1]
    at = n - 1 if isinstance(n, int) else insert_call(before, operator.sub, (n, 1))
    kept = insert_call(before, torch.any, (insert_call(before, operator.eq, (positions, at)), 2))  # [B, G]
    if groups > 1:
        kept = insert_call(before, torch.repeat_interleave, (kept, example(scores.q).shape[1] // groups, 1))
    return insert_call(before, operator.getitem, (kept, (Ellipsis, None, None)))


def attend_last_of_all(attention: Node, before: Node) -> Node | None:
    """Insert the last row `[B, Hq, 1, Dv]` of a dense attention before a node; None where it cannot be told."""
    if attention in under_autocast(attention.graph):
        return None
    given = arguments(attention)
    query, key, value, mask = given.pop("query"), given.pop("key"), given.pop("value"), given.pop("attn_mask", None)
    shapes = [example(x).shape for x in (query, key)]
    # It sees every key: no causal mask.
    if given.pop("is_causal", False) and not statically_known_true(shapes[0][-2] == shapes[1][-2]):
        return None
    if mask is not None and not statically_known_true(example(mask).shape[-2] == 1):
        mask = insert_call(before, operator.getitem, (mask, (Ellipsis, LAST, slice(None))))
    last = insert_call(before, operator.getitem, (query, (slice(None), slice(None), LAST)))
    return insert_call(before, F.scaled_dot_product_attention, (last, key, value, mask), given)


def attend_last_kept(
    attention: SparseAttentionCall | WindowAttentionCall, keys: Node, values: Node, others: str, before: Node
) -> tuple[Node, Node] | None:
    """Insert the last row `[B, Hq, 1, Dv]` of an attention among kept tokens; return it and its attention.

    None where it may be padding, unless `others`, what tokens that are not kept get, is zero ("selected").
    """
    scores = SelectTokensCall.read(attention.positions).scores
    mask = attention.mask
    newest_is_kept = others == "all" or (mask is None and has_last_row(scores))
    if others in ("hold", "window") and not newest_is_kept:
        return None
    n = size(scores.k, 2, before)
    if HidingRowsCall.matches(mask):
        mask = HidingRowsCall.read(mask).mask  # decoding reads the padding row itself
    if mask is not None and not statically_known_true(example(mask).shape[2] == 1):
        mask = insert_call(before, operator.getitem, (mask, (slice(None), slice(None), LAST)))
    last = insert_call(before, operator.getitem, (attention.q, (slice(None), slice(None), LAST)))
    # The last row sees every kept key, as a new token sees the cache.
    out = DecodeAttentionCall(
        q=last, keys=keys, values=values, positions=attention.positions, prompt_length=n, n=n, mask=mask,
        scale=attention.scale, softcap=attention.softcap,
    ).insert(before)  # fmt: skip
    if newest_is_kept:
        return out, out
    return insert_call(before, torch.where, (last_is_kept(attention.positions, scores, before), out, 0.0)), out


def has_last_row(scores: TokenScoresCall) -> bool:
    """Return whether the last row is among the probe rows, the last of them, so that one row sees the last token."""
    return scores.recent_probes > 0


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Narrow what is computed for rows of the last hidden state that nobody uses."""
    for part in find(graph):
        reason = ""
        try:
            with undone_on_error(graph):
                rewrite(part, sites)
        except Mixes as why:
            reason = str(why)
        except Exception as error:  # a fault of ours must not break the user's compile
            if part.reader._erased:  # too late to undo it here
                raise
            reason = str(fault(error))
        sites.demands.append(Demand(str(part.index), reason))
