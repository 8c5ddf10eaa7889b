"""Which tokens a layer keeps of its cache and of a later part of a prompt, or a later turn, that it has attended to.

    scores     = of the newest rows of the part, over every token in memory
    positions  = select_tokens(scores, ...)                     P of the tokens in memory and the new ones

The part attends to every token in memory and to itself: what is dropped, is dropped after that. The tokens in memory
stand before the new ones, in order, so that their place in memory says what is causal.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.graph import insert_call
from zipvl_compile.passes.graph.op_calls import TokenScoresCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.masks.mask_form import four_axes
from zipvl_compile.passes.match.attention_site import Attention
from zipvl_compile.passes.prefill.selection import Selection, best_of, budget_of
from zipvl_compile.passes.settings import Settings


def newest(settings: Settings) -> int:
    """Return how many of a part's newest rows measure attention (tokens); all rows see nearly all."""
    return min(max(settings.probes, 1), settings.reselect_tokens)


def select(attention: Attention, group: str | None, layers: tuple[int, ...], row: int, settings: Settings) -> Selection:
    """Insert a selection before an attention of a later part whose keys are those of every token so far.

    Args:
        attention: of the newest queries.
        group: whose ranks share the heads; None where one has them all.
        layers, row: see `selection.select`.
    """
    node = attention.node
    mask = attention.mask and four_axes(attention.mask, node, attention.mask_hides)
    keys, values = (attention.in_its_dtype(x) for x in (attention.key, attention.value))
    probes, rows = newest_of(attention.query, settings, node), newest(settings)
    shown = newest_row(mask, settings, node)
    scores = scores_of(probes, rows, keys, shown, attention.scale, attention.softcap, settings)
    kept = settings.keep_recent, None
    return best_of(scores, values, kept, group, budget_of(node, keys, layers, row, settings), settings, node)


def newest_of(query: Node, settings: Settings, before: Node) -> Node:
    """Insert the queries of a part `[B, Hq, m, D]` that measure attention."""
    rows = (slice(None), slice(None), slice(-newest(settings), None))
    return insert_call(before, operator.getitem, (query, rows))


def scores_of(
    probes: Node, rows: int, keys: Node, shown: Node | None, scale: Any, softcap: float | None, settings: Settings
) -> TokenScoresCall:
    """Return the call that scores tokens by the queries of the newest of them.

    Args:
        probes: those queries, the oldest first, `[B, Hq, rows, D]`.
        rows: how many.
        keys: of the tokens, `[B, Hkv, tokens, D]`.
        shown: mask of all rows over them, `[B or 1, H or 1, 1, tokens]`; None shows all.
        scale, softcap: of the attention.
    """
    return TokenScoresCall(
        q=probes, k=keys, mask=shown, is_causal=True, scale=scale, softcap=softcap, recent_probes=rows,
        random_probes=0, seed=settings.probe_seed, groups=1, even=settings.score == "even",
    )  # fmt: skip


def newest_row(mask: Node | None, settings: Settings, before: Node) -> Node | None:
    """Insert what any of the rows that measure attention may see, of a mask `[.., m, n]`: all but padding.

    Of the newest row alone some models hide everything, where it is padding itself.
    """
    if mask is None or example(mask).shape[2] == 1:
        return mask
    rows = insert_call(before, operator.getitem, (mask, (slice(None), slice(None), slice(-newest(settings), None))))
    return insert_call(before, torch.amax, (rows, 2, True))


def in_memory(row: Node | None, places: Node, before: Node) -> Node | None:
    """Insert the columns of a mask row `[.., 1, n]` at the positions `[B, 1, tokens]` of the tokens in memory."""
    if row is None:
        return None
    at = insert_call(before, torch.unsqueeze, (places, 2))
    return insert_call(before, torch.take_along_dim, (row, at, 3))
