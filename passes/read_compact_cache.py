"""Decode: attend over the physical tokens of a compacted cache.

Before (the cache layer traced `kv_view`, a tensor of logical length `n` that only tracing needs):

    append_tokens(key_buffer, value_buffer, k, v, at)                                    in place
    out = sdpa(q, repeat_heads(kv_view(key_buffer, positions, prompt_length, n)),
                  repeat_heads(kv_view(value_buffer, positions, prompt_length, n)), mask)

After:

    append_tokens(key_buffer, value_buffer, k, v, at)
    out = decode_attention(q, key_buffer, value_buffer, positions, prompt_length, n, mask, scale, softcap)

Where the layer holds the other prompt tokens at few bits, it is `decode_quantised`, which reads their codes, too.

A static cache is read alike; how many tokens it holds is a tensor there, `held`, and n the most that there may be.

Where the cache holds latents (MLA), keys and values are computed again from the latents in memory:

    k, v = expand(kv_view(latents, ...))      becomes      k, v = expand(latents[:, :, : cached tokens])

Source: decoding over the KV cache of important tokens, arXiv 2410.08584.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from zipvl_compile.passes.graph.evicted_calls import DecodeQuantisedCall
from zipvl_compile.passes.graph.graph import erase_orphans, erase_unread, insert_call, size, undone_on_error
from zipvl_compile.passes.graph.op_calls import DecodeAttentionCall, KVViewCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.masks.mask_form import four_axes
from zipvl_compile.passes.match import reasons
from zipvl_compile.passes.match.attention_site import Attention, mask_fits
from zipvl_compile.passes.match.cache_layers import views_above
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.backward_slice import Cone, TokenRows

TWO_LAYERS = Reason(Why.TWO_LAYERS, "keys and values come from different cache layers")


def refusal(attention: Attention) -> Reason | None:
    """Return why an attention must keep reading the logical view, or None."""
    if len({view.layer for view in views_above(attention)}) > 1:
        return TWO_LAYERS
    if attention.dropout:
        return reasons.dropout(attention.dropout)
    if attention.is_causal:
        return reasons.MISALIGNED_CAUSAL
    if attention.mask is not None and not mask_fits(attention):
        return reasons.mask_shape(list(example(attention.mask).shape))
    return None


def rewrite(attention: Attention) -> Node:
    """Put `decode_attention` over the physical buffers in the place of the attention, and return its call."""
    views = views_above(attention)
    shared: dict[str, Any] = {
        "q": attention.in_its_dtype(attention.query), "positions": views[0].positions, "n": views[0].n,
        "prompt_length": views[0].prompt_length, "scale": attention.scale, "softcap": attention.softcap,
        "mask": attention.mask and four_axes(attention.mask, attention.node, attention.mask_hides),
    }  # fmt: skip
    keys, values = views[0].buffer, views[-1].buffer
    latents = None
    if not KVViewCall.matches(attention.key):
        nodes = [view.node for view in views if view.node is not None]
        latents = TokenRows(nodes).cone((attention.key, attention.value))
        keys, values = _computed_again(latents, attention, views[0])
    shared |= {"keys": attention.in_its_dtype(keys), "values": attention.in_its_dtype(values)}
    if views[0].codes is None:
        out = DecodeAttentionCall(**shared, held=views[0].held).insert(attention.node)
    else:
        out = DecodeQuantisedCall(**shared, **_codes(attention, views)).insert(attention.node)
    attention.replace_with(out)
    if latents is not None:
        latents.erase()
        erase_orphans(view.node for view in views)
    return out


def _codes(attention: Attention, views: list[KVViewCall]) -> dict[str, Any]:
    """Return the other tokens of a layer as the operator takes them."""
    found: dict[str, Any] = {}
    for name, view in zip(("key", "value"), views, strict=True):
        assert view.codes is not None and view.scales is not None
        found |= {f"{name}_codes": view.codes, f"{name}_scales": attention.in_its_dtype(view.scales)}
    return found


def _computed_again(latents: Cone, attention: Attention, view: KVViewCall) -> list[Node]:
    """Compute keys and values from the latents in memory instead of those of every logical token."""
    before = attention.node
    count: Any = size(view.positions, 2, before)  # all rows of the buffers, where only the device knows better
    if view.held is None:
        later = insert_call(before, operator.sub, (view.n, view.prompt_length))
        count = insert_call(before, operator.add, (count, later))
    everything = (slice(None), slice(None), slice(None, count))
    rows = {
        source: insert_call(before, operator.getitem, (KVViewCall.read(source).buffer, everything))
        for source in latents.sources
    }
    new = latents.again(rows, count, before)
    return [new[attention.key], new[attention.value]]


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Rewrite every decode site that allows it; note the reason at the others."""
    for site in sites.decode:
        try:
            site.reason = refusal(site.attention)
            if site.reason is None:
                with undone_on_error(graph):
                    site.node = rewrite(site.attention)
                    site.rewritten = True
        except Exception as error:  # a fault of ours must not break the user's compile
            if site.node._erased:  # too late to undo it here
                raise
            site.reason = reasons.fault(error)
    erase_unread(call.node for call in KVViewCall.all(graph) if call.node is not None)  # whose sizes alone were asked
