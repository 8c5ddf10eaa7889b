"""A later part of a prompt, a later turn, or generated tokens: they and what the cache has are selected anew.

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

After every `reselect_every` generated tokens the same is done in a step of decoding: their queries, which the layer
kept (`note_queries`), measure attention. Where the cache keeps the other tokens elsewhere (`evict`), it is selected
from every token:

    every     = cat(restore_tokens(key_buffer, positions, others, ...), later tokens)
    rows      = token_positions(every)             ->          select_tokens(token_scores(queries, every, ...), ...)
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from zipvl_compile.kernels.note_queries import in_order
from zipvl_compile.kernels.token_positions import cached_positions
from zipvl_compile.passes.graph.evicted_calls import DecodeQuantisedCall
from zipvl_compile.passes.graph.graph import erase_orphans, insert_call, replace, undone_on_error
from zipvl_compile.passes.graph.op_calls import (
    DecodeAttentionCall,
    GatherTokensCall,
    KVViewCall,
    TokenPositionsCall,
)
from zipvl_compile.passes.graph.reading import example, is_op
from zipvl_compile.passes.match import cache_layers, reasons
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.note_queries import noted_rows
from zipvl_compile.passes.prefill import later_part, ranks
from zipvl_compile.passes.prefill.refusals import left_alone, numbers_of, with_counted_layers
from zipvl_compile.passes.prefill.selection import best_of, budget_of
from zipvl_compile.passes.settings import Settings

Call = DecodeAttentionCall | DecodeQuantisedCall
HEADS = Reason(Why.PART_OF_PROMPT, "a later part of a prompt, over a cache whose heads keep tokens of their own")
LATENTS = Reason(Why.PART_OF_PROMPT, "a re-selection from latents of which some are kept elsewhere: nothing is dropped")


def refusal(site: Site, call: Call, number: int, settings: Settings) -> Reason | None:
    """Return why a later part, or a re-selection, drops nothing; or None."""
    part = settings.reselect_tokens > 0 and example(call.q).shape[2] >= settings.reselect_tokens
    if site.noted is None and not part:
        return reasons.LATER_PART
    if example(call.positions).shape[1] != 1 or settings.groups != "layer":
        return HEADS
    if _recalled(site) is not None and not all(map(KVViewCall.matches, (site.attention.key, site.attention.value))):
        return LATENTS
    return left_alone(number, settings)


def _recalled(site: Site) -> list[Node] | None:
    """Return the keys and values of every token, where the layer has called them back; else None."""
    assert site.later_part is not None
    keys = TokenPositionsCall.read(site.later_part).k
    return cache_layers.stored_by(site.later_part) if is_op(keys, "cat") else None


def rewrite(site: Site, call: Call, numbers: tuple[int, ...], row: int, settings: Settings) -> None:
    """Put a selection in the place of the marker of what is in memory."""
    marker, before = site.later_part, site.node  # what the attention reads is there, and what is selected follows
    assert marker is not None
    others = [user for user in marker.users if not GatherTokensCall.matches(user)]
    shown, recalled = later_part.newest_row(call.mask, settings, before), _recalled(site)
    if recalled is None:
        used = (slice(None), slice(None), slice(None, insert_call(before, torch.ops.aten.sym_size.int, (marker, 2))))
        keys, values = (insert_call(before, operator.getitem, (x, used)) for x in (call.keys, call.values))
        places = insert_call(before, cached_positions, (call.positions, call.prompt_length, call.n))
        shown = later_part.in_memory(shown, places, before)
    else:
        keys, values = (site.attention.in_its_dtype(x) for x in recalled)
    if site.noted is None:
        probes, rows = later_part.newest_of(call.q, settings, before), later_part.newest(settings)
    else:
        count = insert_call(before, operator.sub, (call.n, call.prompt_length))
        probes, rows = insert_call(before, in_order, (site.noted, count)), noted_rows(settings)
    scores = later_part.scores_of(probes, rows, keys, shown, call.scale, call.softcap, settings)
    budget = budget_of(before, call.q, numbers, row, settings)
    chosen = best_of(scores, values, (settings.keep_recent, None), site.group, budget, settings, before).positions
    gathers = cache_layers.gathers(marker)
    for old in gathers:
        assert old.node is not None
        replace(old.node, GatherTokensCall(x=old.x, positions=chosen, spare=old.spare).insert(before))
    if recalled is not None:  # what is stored follows
        for follower in cache_layers.followers(marker):
            before.prepend(follower)
        replace(marker, chosen)
        erase_orphans([*(old.node for old in gathers), marker])
        return
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
        if not site.rewritten or site.later_part is None or site.later_part in done:
            continue
        done.add(site.later_part)  # others may read the same layer
        try:
            call = (DecodeQuantisedCall if DecodeQuantisedCall.matches(site.node) else DecodeAttentionCall).read(
                site.node
            )
            site.group, unshared = ranks.shared_by(call.q, site.node, settings)
            site.note = refusal(site, call, numbers[row], settings) or unshared
            if site.note is None:
                with undone_on_error(graph):
                    rewrite(site, call, numbers, row, settings)
        except Exception as error:  # a fault of ours must not break the user's compile
            site.note = reasons.fault(error)
