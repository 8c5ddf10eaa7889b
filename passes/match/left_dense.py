"""The attention that no pass rewrote: left as it is, and named with the reason.

This pass changes nothing. It runs after the passes that make attention sparse (`unmask_dense` takes masks away, and
nothing else), so that a report lists every attention of the graph and every KV cache that no attention reads: a decoder
that stays dense is never silent, and a vision tower that should stay dense says so. Only a hand-written attention of an
unknown form that reads no cache goes unlisted: nothing tells it from any other softmax.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes import read_compact_cache, sparsify_prefill
from zipvl_compile.passes.graph.graph import calls, example, is_call
from zipvl_compile.passes.masks import mask_form as masks
from zipvl_compile.passes.match import eager as eager_attention
from zipvl_compile.passes.match import sdpa as normalize_attention
from zipvl_compile.passes.match.attention_site import AttentionSite, module_path
from zipvl_compile.passes.match.cross_attention import CROSS_ATTENTION, is_cross_attention
from zipvl_compile.passes.match.outcome import Kind, PassReport, SiteOutcome
from zipvl_compile.passes.match.sdpa import NearMiss
from zipvl_compile.passes.tokenwise.backward_slice import TokenRows

ops = torch.ops.zipvl


def apply(graph: Graph) -> PassReport:
    """Report every attention that the passes before neither rewrote nor refused."""
    report = PassReport("leave_dense")
    refused = {site.node for site, _ in sparsify_prefill.find(graph)}
    refused |= {site.node for site in read_compact_cache.find(graph)}
    sites, misses = normalize_attention.find(graph), normalize_attention.near_misses(graph)
    unread = _caches_without_attention(graph, sites, misses)
    explained = {nearest.node for _, nearest in unread if nearest is not None}
    dense = [site for site in sites if site.node not in refused | explained]
    report.sites = _without_false_comfort([(site, classify(site)) for site in dense])
    report.sites += [outcome for outcome, _ in unread]
    report.sites += [
        SiteOutcome(module_path(miss.node), "other", str(miss), by_design=True)
        for miss in misses
        if not eager_attention.is_softmax(miss.node) and miss.node not in explained
    ]
    return report


def _without_false_comfort(found: list[tuple[AttentionSite, SiteOutcome]]) -> list[SiteOutcome]:
    """Return the outcomes; a causal attention without a cache, beside others that have one, is no uncached call."""

    def queries(site: AttentionSite) -> Any:
        return example(site.query).shape[2]

    cached = [queries(site) for site, outcome in found if outcome.kind != "other"]
    return [
        replace(outcome, kind="prefill", reason=OTHER_LAYER, by_design=False)
        if outcome.reason == NO_CACHE and any(statically_known_true(queries(site) == n) for n in cached)
        else outcome
        for site, outcome in found
    ]


def classify(site: AttentionSite) -> SiteOutcome:
    """Return why no pass considers the site, and whether that is as it should be."""
    same_length = statically_known_true(example(site.query).shape[2] == example(site.key).shape[2])
    cached: Kind = "prefill" if same_length else "decode"
    if is_call(site.key, ops.kv_view) or any(is_call(user, ops.token_positions) for user in site.key.users):
        return SiteOutcome(site.name, cached, "keys and values are not cached by the same layer")
    if _grows(site.key) and any(_is_window(user) for user in site.key.users):
        return SiteOutcome(
            site.name, cached, "sliding window or chunks: the cache holds one window only", by_design=True
        )
    if _grows(site.key):
        return SiteOutcome(site.name, cached, FOREIGN_CACHE)
    mask = ("causal",) if site.is_causal else () if site.mask is None else masks.read(site.mask, site.mask_hides).parts
    is_causal = "causal" in mask
    if is_cross_attention(site) and not is_causal:
        return SiteOutcome(site.name, "other", CROSS_ATTENTION, by_design=True)
    if _has_cache(site):
        return SiteOutcome(site.name, cached, OTHER_CACHE)
    if site.key.op == "placeholder" and "unknown" in mask:
        return SiteOutcome(site.name, cached, OTHER_GRAPH)
    if is_causal:
        reason = NO_CACHE
    elif same_length:
        reason = "no KV cache: a vision tower or an encoder"
    else:
        reason = "no KV cache: cross-attention, or an encoder that attends in chunks"
    return SiteOutcome(site.name, "other", reason, by_design=True)


NO_CACHE = "no KV cache: the call has use_cache=False, or needs gradients"
OTHER_GRAPH = "a graph break lies before the attention: its keys come from another graph, cached or not"
OTHER_LAYER = "no KV cache of its own: it reads that of a layer that stays dense"
FOREIGN_CACHE = (
    "KV cache without zipvl layers: the model has cache layers of its own, or the cache was made without "
    "DynamicCache(config=model.config)"
)
OTHER_CACHE = "the KV cache holds something else than keys and values: latents, an index or a state"


def _has_cache(site: AttentionSite) -> bool:
    """Return whether the site's own module extends a tensor along the token axis, above its keys."""
    seen, todo = set(), [site.key]
    while todo:
        node = todo.pop()
        if node in seen or not module_path(node).startswith(site.name) or node.op == "placeholder":
            continue
        seen.add(node)
        if _grows(node):
            return True
        todo.extend(node.all_input_nodes)
    return False


def _caches_without_attention(
    graph: Graph, sites: list[AttentionSite], misses: list[NearMiss]
) -> list[tuple[SiteOutcome, AttentionSite | NearMiss | None]]:
    """Name the cache layers that none of the `sites` reads, each with the attention that comes nearest."""
    read = {x for site in sites for x in (*site.inputs, site.key, site.value)}
    attended: dict[Node, AttentionSite | NearMiss] = {site.node: site for site in sites}
    attended |= {miss.node: miss for miss in misses}
    # A rewritten prefill that keeps its cache full reads K in token_scores.
    rewritten = set(calls(graph, ops.token_scores))
    outcomes = []
    layers = set()  # a layer has a view of its keys and one of its values
    for kind, marker in _MARKERS.items():
        for node in calls(graph, marker):
            source, layer = _source(node), node.args[1:] or node
            if layer in layers:
                continue
            reader = None if source in read else _first_reader(source, {*attended, *rewritten})
            if source not in read and reader not in rewritten:
                layers.add(layer)
                nearest = attended.get(reader)  # type: ignore[arg-type]
                outcomes.append((SiteOutcome(module_path(node), kind, _unread(node, source, nearest)), nearest))
    return outcomes


def _first_reader(source: Node, attentions: set[Node]) -> Node | None:
    """Return the first of `attentions` that the cached tensor flows into."""
    reached, node = {source}, source.next
    while node.op != "output":
        if not reached.isdisjoint(node.all_input_nodes):
            if node in attentions:
                return node
            reached.add(node)
        node = node.next
    return None


def _unread(marker: Node, source: Node, nearest: AttentionSite | NearMiss | None) -> str:
    """Return why nothing recognisable attends to `source`."""
    stored = (ops.token_positions, ops.gather_tokens)
    if all(user.op == "output" or any(is_call(user, store) for store in stored) for user in source.users):
        return "a graph break lies between the cache update and the attention"
    if isinstance(nearest, AttentionSite):
        difference = TokenRows(_stored(marker)).differs((nearest.key, nearest.value))
        return f"latent KV cache: {difference or 'keys and values are not cached alike'}"
    if nearest is None:
        return "no attention over the cached keys: load the model with attn_implementation='sdpa'"
    return f"not recognised as attention ({nearest}): load the model with attn_implementation='sdpa'"


def _stored(marker: Node) -> list[Node]:
    """Return everything that the layer of a marker stores: keys and values, or latents."""
    if is_call(marker, ops.kv_view):
        return [view for view in calls(marker.graph, ops.kv_view) if view.args[1:] == marker.args[1:]]
    return sparsify_prefill.cached_by(marker)


_MARKERS: dict[Kind, Callable] = {"prefill": ops.token_positions, "decode": ops.kv_view}


def _source(marker: Node) -> Node:
    """Return the node that attention reads as the keys (or values) of a cache layer."""
    return marker if is_call(marker, ops.kv_view) else marker.args[0]  # type: ignore[return-value]


def _is_window(node: Node) -> bool:
    """Return whether `node` is the slice `x[:, :, -w:]` that a sliding-window layer caches."""
    if not (is_call(node, operator.getitem) and isinstance(node.args[1], tuple) and len(node.args[1]) > 2):
        return False
    token_slice = node.args[1][2]
    return isinstance(token_slice, slice) and isinstance(token_slice.start, int) and token_slice.start < 0


def _grows(node: Node) -> bool:
    """Return whether `node` concatenates keys along the token axis, as caches do."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return is_call(node, torch.cat) and dim in (2, -2) and example(node).dim() == 4
