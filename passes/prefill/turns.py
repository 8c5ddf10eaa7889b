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

from zipvl_compile.passes.graph.collectives import insert_sum
from zipvl_compile.passes.graph.graph import insert_call
from zipvl_compile.passes.graph.op_calls import SelectTokensCall, TokenScoresCall, outputs
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.prefill import ranking
from zipvl_compile.passes.settings import Settings


def newest(settings: Settings) -> int:
    """Return how many of a part's newest rows measure attention (tokens); all rows see nearly all."""
    return min(max(settings.probes, 1), settings.reselect_tokens)


def select(
    query: Node, keys: Node, values: Node, shown: Node | None, scale: Any, softcap: float | None, group: str | None,
    budget: Node | None, settings: Settings, before: Node,
) -> Node:  # fmt: skip
    """Insert a selection before a node; return the places of the kept tokens among those in memory, `[B, 1, P]`.

    Args:
        query: of the part, `[B, Hq, m, D]`, its rows are the newest.
        keys, values: of every token, `[B, Hkv, tokens, D]` and `[.., Dv]`.
        shown: mask of the newest row over them, `[B or 1, H or 1, 1, tokens]`; None shows all.
        scale, softcap: of the attention.
        group: whose ranks share the heads; None where one has them all.
        budget: numbers of the layer's budget, where they may change from call to call.
    """
    rows = newest(settings)
    probes = insert_call(before, operator.getitem, (query, (slice(None), slice(None), slice(-rows, None))))
    scores = TokenScoresCall(
        q=probes, k=keys, mask=shown, is_causal=True, scale=scale, softcap=softcap, recent_probes=rows,
        random_probes=0, seed=settings.probe_seed, groups=1, even=settings.score == "even",
    ).insert(before)  # fmt: skip
    accumulated, visible = outputs(scores, before)
    if group is not None:
        accumulated = insert_sum(accumulated, group, before)
    return SelectTokensCall(
        accumulated=accumulated, visible=visible, tau=settings.tau, keep_ratio=settings.keep_ratio,
        keep_recent=settings.keep_recent, keep_tokens=settings.keep_tokens, floor=settings.floor,
        keep_first=settings.keep_first,
        ranking=ranking.insert(accumulated, visible, keys, values, settings, before), budget=budget,
    ).insert(before)  # fmt: skip


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
