"""Prefill: attend among the important tokens only, and keep only those in the KV cache.

    a[b,j] = attention that probe rows give to token j;   p = fewest tokens that reach tau of it   (arXiv 2410.08584)

Before (the cache layer traced `token_positions` and `gather_tokens`; they keep every token):

    positions = token_positions(k)
    keys      = gather_tokens(k, positions, spare)          graph output: the layer's cache
    values    = gather_tokens(v, positions, spare)          graph output: the layer's cache
    out       = sdpa(q, repeat_heads(k), repeat_heads(v), mask, is_causal)

After:

    scores, visible = token_scores(q, k, mask, is_causal, ...)
    positions       = select_tokens(scores, visible, tau, ...)                  P <= n tokens
    keys, values    = gather_tokens(k | v, positions, spare)                    the same nodes, now P tokens
    out             = sparse_attention(q, keys, values, positions, mask, ...)

Rows that are read after the last layer (`read_demands`) are kept, on top of p, and so attend; where all are read,
every query attends to the kept tokens. Where what reads the output cannot take rows of zeros (`keep_true_rows`) and the
rule gives some, the attention stays as it is and only the cache is compacted. With `evict="keep"` the cache keeps its
full-length nodes, and the attention gets gathers of its own.

Where the cache holds latents (MLA), K and V are computed from them token by token: the cache keeps the latents of the
kept tokens, and the attention reads gathers of K and V.

A later part of a prompt, over a cache that holds every token, is a prefill whose queries are the newest ones: it
attends to everything, and the cache keeps what is selected after that (`prefill/later_part.py`).

Several attentions may read the K and V of one cache layer (shared KV: Gemma 3n, Gemma 4). The first one selects; the
others attend among the same kept tokens, since the cache will hold no others when they decode.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Graph, Node

from zipvl_compile.passes.graph.graph import insert_call, undone_on_error
from zipvl_compile.passes.graph.op_calls import DecodeAttentionCall, SparseAttentionCall, WindowAttentionCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.masks.mask_form import CanonicalMasks, four_axes
from zipvl_compile.passes.match import reasons
from zipvl_compile.passes.match.attention_site import Attention
from zipvl_compile.passes.match.outcome import Demanded
from zipvl_compile.passes.match.reasons import Reason
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.prefill import later_part, ranks
from zipvl_compile.passes.prefill.refusals import (
    FIRST_IS_DENSE,
    left_alone,
    numbers_of,
    reader_refusal,
    refusal,
    shape_of,
    too_short,
    with_counted_layers,
)
from zipvl_compile.passes.prefill.selection import Kept, compact, fits, keeps_all, select
from zipvl_compile.passes.settings import Settings

QUERIES = {"zero": "selected", "hold": "hold", "all": "all"}  # as sparse_attention names them


def attend(attention: Attention, kept: Kept, masks: CanonicalMasks, settings: Settings) -> Node:
    """Put attention among the kept tokens in the place of the dense attention, and return its call."""
    if attention.reads_whole_prompt and settings.local:
        rows, is_causal = masks.hiding(attention)
        key, value = (attention.in_its_dtype(x) for x in (attention.key, attention.value))
        out = WindowAttentionCall(
            q=attention.query, k=key, v=value, kept_k=kept.keys, kept_v=kept.values, positions=kept.positions,
            visible=kept.selection.visible, mask=rows, is_causal=is_causal, scale=attention.scale,
            softcap=attention.softcap, window=settings.window, sinks=settings.sinks, kept_window=settings.kept_window,
            queries=settings.queries, dense_from=settings.dense_from,
        ).insert(attention.node)  # fmt: skip
    elif attention.reads_whole_prompt:
        rows, is_causal = masks.hiding(attention)
        out = SparseAttentionCall(
            q=attention.query, k=kept.keys, v=kept.values, positions=kept.positions, mask=rows, is_causal=is_causal,
            scale=attention.scale, softcap=attention.softcap, queries=QUERIES[settings.unselected],
        ).insert(attention.node)  # fmt: skip
    else:  # a reader of shared KV that has the newest queries only: it attends as if it decoded
        n = example(attention.key).shape[2]
        if not isinstance(n, int):
            n = insert_call(attention.node, torch.ops.aten.sym_size.int, (attention.key, 2))
        mask = attention.mask and four_axes(attention.mask, attention.node, attention.mask_hides)
        out = DecodeAttentionCall(
            q=attention.query, keys=kept.keys, values=kept.values, positions=kept.positions, prompt_length=n, n=n,
            mask=mask, scale=attention.scale, softcap=attention.softcap,
        ).insert(attention.node)  # fmt: skip
    attention.replace_with(out)
    return out


def reason_to_stay(
    site: Site, owner: tuple[Attention, Kept] | None, first: bool, number: int, settings: Settings
) -> Reason | None:
    """Return why a site stays dense, or None; `owner` selected for its layer, unless it is the `first` itself."""
    assert site.layer is not None
    if not first:
        return FIRST_IS_DENSE if owner is None else reader_refusal(site.attention, owner[0])
    if (alone := left_alone(number, settings)) is not None:
        return alone
    # Only where all else allows it: what it costs is measured, and the prompt's length becomes a guard.
    return refusal(site.attention, site.layer, settings) or too_short(site.attention, site.shape, settings)  # type: ignore[arg-type]


def dense_because(site: Site, owner: Attention, settings: Settings) -> str:
    """Return why a prefill attends to every token though its cache is compacted, or an empty string.

    `owner` selected for its layer.
    """
    if settings.prefill == "dense":
        return 'asked for by prefill="dense"'
    if not owner.reads_whole_prompt:
        return "a later part of a prompt attends to every token in memory"
    if settings.unselected == "hold":  # those are rows of the model's own
        return ""
    # A token sees itself in its window, so that no row is zero, unless a mask of its own form forbids it.
    windowed = settings.local and (site.mask is None or not site.mask.needs_matrix)
    return "" if windowed else site.needs_true_rows


def rule_of(number: int, settings: Settings, demanded: Demanded) -> Settings:
    """Return the rule of the layer of a number; where every row is read, every query attends."""
    own = settings.of_layer(number)
    if not demanded.every or own.unselected == "all":
        return own
    windows = own.kept_window or own.unselected == "window"  # a window stays, and kept tokens are seen besides
    return dataclasses.replace(own, unselected="all", kept_window=windows, skip="attention")


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Rewrite every prefill site that allows it; note the reason at the others."""
    layers: dict[Node, tuple[Attention, Kept] | None] = {}
    numbers = numbers_of(sites)
    settings = with_counted_layers(settings, numbers)
    shared, left = None, 0  # a selection, and for how many layers it is still good
    for row, site in enumerate(sites.prefill):
        assert site.layer is not None
        first, owner = site.layer not in layers, layers.get(site.layer)
        try:
            site.mask = sites.masks.form(site.attention)
            own = rule_of(numbers[row], settings, sites.demanded)
            site.skips = own.skip == "layer"
            site.group, unshared = ranks.shared_by(site.attention.query, site.attention.node, own)
            site.shape = shape_of(site.attention, site.mask, own, site.group is not None)
            site.reason = unshared or reason_to_stay(site, owner, first, numbers[row], own)
            if site.reason is None:
                with undone_on_error(graph):
                    attention = dataclasses.replace(
                        site.attention, query=site.attention.in_its_dtype(site.attention.query)
                    )
                    if owner is None:
                        chosen = shared if left and shared is not None and fits(shared, attention) else None
                        site.selects = chosen is None
                        if chosen is None and attention.reads_whole_prompt:
                            chosen = select(site, attention, sites.masks, sites.demanded, numbers, row, own)
                        elif chosen is None:
                            chosen = later_part.select(attention, site.group, numbers, row, own)
                        owner = attention, compact(site, attention, chosen, own)
                        left = (left if not site.selects else settings.score_every or len(sites.prefill)) - 1
                        shared = chosen  # only now: what is undone serves no other layer
                    if keeps_all(owner[1], attention) or not (needed := dense_because(site, owner[0], own)):
                        site.node = attend(attention, owner[1], sites.masks, own)
                    else:
                        site.needs_true_rows = needed
                    site.rewritten = True
        except Exception as error:  # a fault of ours must not break the user's compile
            if site.layer._erased and first:  # too late to undo it here
                raise
            site.reason, owner = reasons.fault(error), None if first else owner
        layers.setdefault(site.layer, owner)
    sites.masks.erase_unread()
