"""The attention that no pass rewrote: left as it is, and named with the reason.

This pass changes nothing. It runs last, so that a report lists every attention of the graph: a decoder that stays
dense is never silent, and a vision tower that should stay dense says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes import attention_site, read_compact_cache, sparsify_prefill
from zipvl_compile.passes.attention_site import AttentionSite
from zipvl_compile.passes.graph_edit import calls, example, is_call
from zipvl_compile.passes.pass_report import Kind, PassReport, SiteOutcome

ops = torch.ops.zipvl


def apply(graph: Graph) -> PassReport:
    """Report every attention that the passes before neither rewrote nor refused."""
    report = PassReport("leave_dense")
    refused = {site.node for site, _ in sparsify_prefill.find(graph)}
    refused |= {site.node for site in read_compact_cache.find(graph)}
    sites = attention_site.find(graph)
    report.sites = [classify(site) for site in sites if site.node not in refused]
    read = {site.node for site in sites}
    report.sites += [
        SiteOutcome(attention_site.module_path(node), "other", "inputs are not [batch, heads, tokens, head_dim]", True)
        for node in calls(graph, attention_site.SDPA)
        if node not in read
    ]
    report.sites += _caches_without_attention(graph, sites)
    return report


def classify(site: AttentionSite) -> SiteOutcome:
    """Return why no pass considers the site, and whether that is as it should be."""
    same_length = statically_known_true(example(site.query).shape[2] == example(site.key).shape[2])
    cached: Kind = "prefill" if same_length else "decode"
    if is_call(site.key, ops.kv_view) or any(is_call(user, ops.token_positions) for user in site.key.users):
        return SiteOutcome(site.name, cached, "keys and values are not cached by the same layer")
    if _grows(site.key) and any(_is_window(user) for user in site.key.users):
        return SiteOutcome(site.name, cached, "sliding window: the cache holds one window only", by_design=True)
    if _grows(site.key):
        reason = "KV cache without zipvl layers: let the model make its cache, or use DynamicCache(config=model.config)"
        return SiteOutcome(site.name, cached, reason)
    if site.is_causal:
        reason = "no KV cache: the call has use_cache=False, or needs gradients"
    elif same_length:
        reason = "no KV cache: a vision tower or an encoder"
    else:
        reason = "no KV cache: cross-attention, or an encoder that attends in chunks"
    return SiteOutcome(site.name, "other", reason, by_design=True)


def _caches_without_attention(graph: Graph, sites: list[AttentionSite]) -> list[SiteOutcome]:
    """Name the cache layers that none of the `sites` reads."""
    read = {x for site in sites for x in (*site.inputs, site.key, site.value)}
    outcomes = []
    for kind, marker in _MARKERS.items():
        for node in calls(graph, marker):
            source = _source(node)
            # A rewritten prefill that keeps its cache full reads K in token_scores.
            if source not in read and not any(is_call(user, ops.token_scores) for user in source.users):
                outcomes.append(SiteOutcome(attention_site.module_path(node), kind, _unread(source)))
    return outcomes


def _unread(source: Node) -> str:
    """Return why nothing recognisable attends to `source`."""
    stored = (ops.token_positions, ops.gather_tokens)
    if all(user.op == "output" or any(is_call(user, store) for store in stored) for user in source.users):
        return "a graph break lies between the cache update and the attention"
    return (
        "attention is not scaled_dot_product_attention over the cached keys: "
        "load the model with attn_implementation='sdpa'"
    )


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
    return is_call(node, torch.cat) and dim in (2, -2)
