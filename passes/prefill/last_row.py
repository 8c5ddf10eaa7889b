"""The attention of the newest token alone, for a last layer of which nothing else is read.

It sees every kept key, as a new token sees the cache: `decode_attention`, or `window_attention` where it sees its
window, too. Where it may be padding, which is not kept, its output is what tokens get that are not kept.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import insert_call, size
from zipvl_compile.passes.graph.op_calls import (
    DecodeAttentionCall,
    HidingRowsCall,
    SelectTokensCall,
    SparseAttentionCall,
    TokenScoresCall,
    WindowAttentionCall,
)
from zipvl_compile.passes.graph.reading import arguments, example, is_op
from zipvl_compile.passes.tokenwise.sole_readers import under_autocast

LAST = slice(-1, None, None)


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
