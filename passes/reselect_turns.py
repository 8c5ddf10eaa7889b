"""A later part of a prompt, or a later turn, over a compacted cache: its tokens and those in memory are selected anew.

Before (the cache layer traced `token_positions` of what is in memory, which keeps all of it):

    append_tokens(key_buffer, value_buffer, k, v, at)                                    in place
    out       = decode_attention(q, key_buffer, value_buffer, positions, ...)            m new tokens
    rows      = token_positions(key_buffer[:, :, : in memory])
    keys      = gather_tokens(key_buffer[:, :, : in memory], rows, spare)                graph output, as values are
    positions = gather(cached_positions(...), rows)                                      graph output

After, where m is at least `reselect_tokens`:

    rows      = select_tokens(token_scores(q[newest], key_buffer[:, :, : in memory], ...), ...)
    ...                                                                                  the same nodes, P tokens

So a conversation has a bounded cache. The new tokens attend to all that is in memory, as they would without it.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from zipvl_compile.kernels.decode_attention import cached_positions
from zipvl_compile.passes.graph.graph import erase_orphans, insert_call, replace, undone_on_error
from zipvl_compile.passes.graph.op_calls import DecodeAttentionCall, GatherTokensCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.match import cache_layers, reasons
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.prefill import ranks, turns
from zipvl_compile.passes.prefill.refusals import left_alone, numbers_of, with_counted_layers
from zipvl_compile.passes.prefill.selection import budget_of
from zipvl_compile.passes.settings import Settings

HEADS = Reason(Why.PART_OF_PROMPT, "a later part of a prompt, over a cache whose heads keep tokens of their own")


def refusal(site: Site, call: DecodeAttentionCall, number: int, settings: Settings) -> Reason | None:
    """Return why a later part drops nothing, or None."""
    if settings.reselect_tokens == 0 or example(call.q).shape[2] < settings.reselect_tokens:
        return reasons.LATER_PART
    if example(call.positions).shape[1] != 1 or settings.groups != "layer":
        return HEADS
    return left_alone(number, settings) or ranks.refusal(call.q, site.node, settings)


def rewrite(marker: Node, site: Site, call: DecodeAttentionCall, budget: Node | None, settings: Settings) -> None:
    """Put a selection in the place of the marker."""
    before, others = site.node, [user for user in marker.users if not GatherTokensCall.matches(user)]
    used = (slice(None), slice(None), slice(None, insert_call(before, torch.ops.aten.sym_size.int, (marker, 2))))
    keys, values = (insert_call(before, operator.getitem, (x, used)) for x in (call.keys, call.values))
    places = insert_call(before, cached_positions, (call.positions, call.prompt_length, call.n))
    shown = turns.in_memory(turns.newest_row(call.mask, settings, before), places, before)
    chosen = turns.select(
        call.q, keys, values, shown, call.scale, call.softcap, ranks.group_of(call.q, site.node), budget, settings,
        before,
    )  # fmt: skip
    gathers = cache_layers.gathers(marker)
    for old in gathers:
        assert old.node is not None
        replace(old.node, GatherTokensCall(x=old.x, positions=chosen, spare=old.spare).insert(before))
    for user in others:  # where the kept tokens stand
        args = map_arg(user.args, lambda x: chosen if x is marker else x)
        replace(user, insert_call(before, user.target, args, dict(user.kwargs)))  # type: ignore[arg-type]
    erase_orphans([*(old.node for old in gathers), *others, marker])


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Select anew at every cache layer that a later part was appended to; note the reason at the others."""
    if settings.keeps_all or settings.evict == "keep":  # nothing is to be dropped
        return
    numbers = numbers_of(sites)
    settings = with_counted_layers(settings, numbers)
    done: set[Node] = set()
    for row, site in enumerate(sites.decode, len(sites.prefill)):
        if not site.rewritten or site.turn is None or site.turn in done or site.turn._erased:
            continue
        done.add(site.turn)
        call = DecodeAttentionCall.read(site.node)
        site.note = refusal(site, call, numbers[row], settings)
        if site.note is not None:
            continue
        try:
            with undone_on_error(graph):
                rewrite(site.turn, site, call, budget_of(site.node, call.q, numbers, row, settings), settings)
        except Exception as error:  # a fault of ours must not break the user's compile
            site.note = reasons.fault(error)
