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
every query attends. Where what reads the output cannot take rows of zeros (`keep_true_rows`), the attention stays as it
is and only the cache is compacted. With `evict="keep"` the cache keeps its full-length nodes, and the attention gets
gathers of its own.

Where the cache holds latents (MLA), K and V are computed from them token by token: the cache keeps the latents of the
kept tokens, and the attention reads gathers of K and V.

Several attentions may read the K and V of one cache layer (shared KV: Gemma 3n, Gemma 4). The first one selects; the
others attend among the same kept tokens, since the cache will hold no others when they decode.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.cost_model import NEVER
from zipvl_compile.passes.graph.graph import erase_orphans, insert_call, replace, undone_on_error
from zipvl_compile.passes.graph.op_calls import (
    DecodeAttentionCall,
    GatherTokensCall,
    SelectTokensCall,
    SparseAttentionCall,
    TokenScoresCall,
    outputs,
)
from zipvl_compile.passes.graph.reading import changed_in_place, example
from zipvl_compile.passes.masks.mask_form import CanonicalMasks, MaskForm, four_axes
from zipvl_compile.passes.match import cache_layers, reasons
from zipvl_compile.passes.match.attention_site import Attention, AttentionShape, mask_fits
from zipvl_compile.passes.match.cross_attention import is_cross_attention
from zipvl_compile.passes.match.outcome import Demanded
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.row_select import token_positions

READ_AGAIN = Reason(Why.CACHE_READ_AGAIN, "the layer's cache is read again in the same graph")
CHANGED = Reason(Why.CHANGED_IN_PLACE, "keys or values are changed in place")
NOT_CAUSAL = Reason(
    Why.NOT_CAUSAL,
    "no causal mask: its tokens see all others, as in an encoder; transformers makes no mask for "
    "attn_implementation='paged|eager' outside of continuous batching: load the model with 'sdpa'",
)
ONE_TOKEN = Reason(Why.ONE_TOKEN, "prompt of one token")
NO_GAIN = Reason(Why.NO_GAIN, "keeping every token gains nothing over dense attention", NEVER)
FIRST_IS_DENSE = Reason(Why.SHARED_KV, "shared KV: the first attention over this layer's cache stays dense")
TWO_LAYERS = Reason(Why.SHARED_KV, "shared KV: this attention reads the keys and values of two cache layers")


def refusal(attention: Attention, layer: Node) -> Reason | None:
    """Return why an attention must stay dense, or None."""
    q, k = example(attention.query), example(attention.key)
    if statically_known_true(k.shape[2] == 1):
        return ONE_TOKEN
    cached = attention.key in cache_layers.stored_by(layer)  # else it is computed from the cache's latents
    if cached and any(changed_in_place(x) for x in (attention.key, attention.value)):
        return CHANGED
    if not cache_layers.only_cached(layer):
        return READ_AGAIN
    if is_cross_attention(attention):
        return reasons.CROSS_ATTENTION
    if not attention.reads_whole_prompt:
        return Reason(
            Why.PART_OF_PROMPT, f"{q.shape[2]} queries over {k.shape[2]} keys: not the prefill of a whole prompt"
        )
    if unreadable := unreadable_inputs(attention):
        return unreadable
    return NOT_CAUSAL if attention.mask is None and not attention.is_causal else None


def unreadable_inputs(attention: Attention) -> Reason | None:
    """Return why the operators cannot read an attention's inputs, or None."""
    q, k = example(attention.query), example(attention.key)
    if attention.dropout:
        return reasons.dropout(attention.dropout)
    if not statically_known_true(q.shape[0] == k.shape[0]):
        return Reason(Why.BATCH, f"batch {q.shape[0]} of queries over batch {k.shape[0]} of keys")
    if attention.mask is not None and not mask_fits(attention):
        return reasons.mask_shape(list(example(attention.mask).shape))
    return None


def reader_refusal(attention: Attention, owner: Attention) -> Reason | None:
    """Return why a further attention over the same keys and values must stay dense, or None."""
    if (attention.key, attention.value) != (owner.key, owner.value):
        return TWO_LAYERS
    if attention.is_causal and not attention.reads_whole_prompt:
        return reasons.MISALIGNED_CAUSAL
    return unreadable_inputs(attention)


def too_short(attention: Attention, shape: AttentionShape, settings: Settings) -> Reason | None:
    """Return that the prompt is too short to gain, or None.

    `n >= min_tokens` becomes a guard of the compiled graph: a shorter prompt compiles once, dense.
    """
    query, n, least = example(attention.query), example(attention.key).shape[2], settings.min_tokens
    if callable(least):
        least = least(shape, query.dtype, query.device)
    if least >= NEVER:
        return NO_GAIN
    return None if n >= least else Reason(Why.SHORT_PROMPT, f"prompt shorter than min_tokens={least}", least)


def shape_of(attention: Attention, form: MaskForm, settings: Settings) -> AttentionShape:
    """Return what the cost of an attention depends on; a batch of symbolic size counts as one sample."""
    q, k, v = (example(x) for x in (attention.query, attention.key, attention.value))
    batch = q.shape[0] if isinstance(q.shape[0], int) else 1
    probes = settings.recent_probes + settings.random_probes
    sizes = (batch, q.shape[1], k.shape[1], q.shape[3], v.shape[3], probes, q.element_size())
    masked = attention.mask is not None
    return AttentionShape(*sizes, settings.queries == "all", masked, masked and form.needs_matrix)


@dataclass(frozen=True)
class Kept:
    """The tokens that a layer keeps: their keys, values (with spare rows) and positions."""

    keys: Node
    values: Node
    positions: Node


def always_kept(site: Site, demanded: Demanded, settings: Settings) -> tuple[Any, Node | None]:
    """Return `keep_recent`, and the positions of further tokens that are always kept, as a node, where there are some.

    `keep_recent` counts tokens that probe rows see. The last probe row sees all but what padding hides, unless the mask
    has a form of its own: there, and where the last row is no probe row, demanded rows are kept by their positions.
    """
    before, least = site.attention.node, settings.keep_recent
    newest, protected = demanded.newest, [*demanded.others]
    seen = settings.recent_probes > 0 and (site.mask is None or not site.mask.needs_matrix or newest == 1)
    if seen and isinstance(newest, Node):
        newest = newest if least == 1 else insert_call(before, torch.sym_max, (newest, least))
    elif seen:
        newest = max(newest, least)
    else:
        start = -newest if isinstance(newest, int) else insert_call(before, operator.neg, (newest,))
        protected.append(token_positions(site.attention.key, slice(start, None), before))
        newest = least
    if len(protected) > 1:
        return newest, insert_call(before, torch.cat, (protected,))
    return newest, protected[0] if protected else None


def select(site: Site, attention: Attention, masks: CanonicalMasks, demanded: Demanded, settings: Settings) -> Kept:
    """Insert scoring, selection and compaction before the attention; the cache keeps the kept tokens."""
    layer, node, (rows, is_causal) = site.layer, attention.node, masks.insert(attention)
    assert layer is not None
    scores = TokenScoresCall(
        q=attention.query, k=attention.in_its_dtype(attention.key), mask=rows, is_causal=is_causal,
        scale=attention.scale, softcap=attention.softcap, recent_probes=settings.recent_probes,
        random_probes=settings.random_probes, seed=settings.seed, groups=1,
    ).insert(node)  # fmt: skip
    accumulated, visible = outputs(scores, node)
    keep_recent, protected = always_kept(site, demanded, settings)
    positions = SelectTokensCall(
        accumulated=accumulated, visible=visible, tau=settings.tau, keep_ratio=settings.keep_ratio,
        keep_recent=keep_recent, protected=protected,
    ).insert(node)  # fmt: skip
    gathers = cache_layers.gathers(layer)
    # One for every buffer of the cache, also where K and V are one tensor: decoding writes into each.
    compact = [] if settings.evict == "keep" else [
        GatherTokensCall(x=old.x, positions=positions, spare=old.spare).insert(node) for old in gathers
    ]  # fmt: skip
    new = {old.x: gather for old, gather in zip(gathers, compact, strict=False)}
    keys, values = (
        attention.in_its_dtype(new.get(x) or GatherTokensCall(x=x, positions=positions, spare=0).insert(node))
        for x in (attention.key, attention.value)
    )
    if compact:
        for old, gather in zip(gathers, compact, strict=True):
            assert old.node is not None
            replace(old.node, gather)
        replace(layer, positions)
        erase_orphans([*(old.node for old in gathers), layer])
    return Kept(keys, values, positions)


def keeps_all(kept: Kept, attention: Attention) -> bool:
    """Return whether every token is kept, so that no row of the attention becomes zero."""
    return statically_known_true(example(kept.positions).shape[2] == example(attention.key).shape[2])


def attend(attention: Attention, kept: Kept, masks: CanonicalMasks, settings: Settings) -> Node:
    """Put attention among the kept tokens in the place of the dense attention, and return its call."""
    if attention.reads_whole_prompt:
        rows, is_causal = masks.hiding(attention)
        out = SparseAttentionCall(
            q=attention.query, k=kept.keys, v=kept.values, positions=kept.positions, mask=rows, is_causal=is_causal,
            scale=attention.scale, softcap=attention.softcap, queries=settings.queries,
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


def reason_to_stay(site: Site, owner: tuple[Attention, Kept] | None, first: bool, settings: Settings) -> Reason | None:
    """Return why a site stays dense, or None; `owner` selected for its layer, unless it is the `first` itself."""
    assert site.layer is not None
    if not first:
        return FIRST_IS_DENSE if owner is None else reader_refusal(site.attention, owner[0])
    # Only where all else allows it: what it costs is measured, and the prompt's length becomes a guard.
    return refusal(site.attention, site.layer) or too_short(site.attention, site.shape, settings)  # type: ignore[arg-type]


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Rewrite every prefill site that allows it; note the reason at the others."""
    if sites.demanded.every:
        settings = dataclasses.replace(settings, queries="all")
    layers: dict[Node, tuple[Attention, Kept] | None] = {}
    for site in sites.prefill:
        assert site.layer is not None
        first, owner = site.layer not in layers, layers.get(site.layer)
        try:
            site.mask = sites.masks.form(site.attention)
            site.shape = shape_of(site.attention, site.mask, settings)
            site.reason = reason_to_stay(site, owner, first, settings)
            if site.reason is None:
                with undone_on_error(graph):
                    attention = dataclasses.replace(
                        site.attention, query=site.attention.in_its_dtype(site.attention.query)
                    )
                    if owner is None:
                        owner = attention, select(site, attention, sites.masks, sites.demanded, settings)
                    if not site.needs_true_rows or keeps_all(owner[1], attention):
                        site.node = attend(attention, owner[1], sites.masks, settings)
                    site.rewritten = True
        except Exception as error:  # a fault of ours must not break the user's compile
            if site.layer._erased and first:  # too late to undo it here
                raise
            site.reason, owner = reasons.fault(error), None if first else owner
        layers.setdefault(site.layer, owner)
    sites.masks.erase_unread()
