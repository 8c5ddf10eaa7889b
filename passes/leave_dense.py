"""The attention that no pass rewrote: left as it is, and named with the reason.

This pass changes nothing. It runs last, so that a report lists every attention of the graph: a decoder that stays
dense is never silent, and a vision tower that should stay dense says so.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes import attention_site
from zipvl_compile.passes.attention_site import AttentionSite
from zipvl_compile.passes.graph_edit import calls, example, is_call
from zipvl_compile.passes.pass_report import PassReport, SiteOutcome

ops = torch.ops.zipvl


def apply(graph: Graph, *, already: list[PassReport]) -> PassReport:
    """Report what the passes before left dense without having considered it.

    Args:
        already: reports of the earlier passes; a site that one of them refused is not listed twice.
    """
    report = PassReport("leave_dense")
    refused = {site.layer for earlier in already for site in earlier.sites if not site.rewritten}
    for site in attention_site.find(graph):
        if site.name not in refused:
            report.sites.append(SiteOutcome(site.name, "other", reason(site)))
    report.sites.extend(_caches_read_otherwise(graph, already))
    return report


def reason(site: AttentionSite) -> str:
    """Return why no pass considers the site."""
    q, k = example(site.query), example(site.key)
    source = site.key
    if source.target in (torch.cat, torch.concat):
        return "KV cache without zipvl layers: let the model make its cache, or use DynamicCache(config=model.config)"
    if is_call(source, ops.kv_view):
        return "keys and values are not cached by the same layer"
    if not statically_known_true(q.shape[2] == k.shape[2]):
        return f"cross-attention: {q.shape[2]} queries over {k.shape[2]} keys without a growing cache"
    if site.is_causal:
        return "no KV cache: the call has use_cache=False, or needs gradients"
    return "no KV cache: a vision tower or an encoder"


def _caches_read_otherwise(graph: Graph, already: list[PassReport]) -> list[SiteOutcome]:
    """Name the cache layers that no SDPA reads: their attention has another form."""
    known = {site.key for site in attention_site.find(graph)}
    rewritten = any(site.rewritten for earlier in already for site in earlier.sites)
    outcomes = []
    for target, kind in ((ops.token_positions, "prefill"), (ops.kv_view, "decode")):
        for node in calls(graph, target):
            source: Node = node if kind == "decode" else node.args[0]  # type: ignore[assignment]
            full_cache_kept = kind == "prefill" and rewritten and len(source.users) > 2 and _attends(source)
            if source not in known and not full_cache_kept:
                reason = (
                    "attention is not scaled_dot_product_attention over the cached keys: "
                    "load the model with attn_implementation='sdpa'"
                )
                outcomes.append(SiteOutcome(attention_site.module_path(node), kind, reason))  # type: ignore[arg-type]
    return outcomes


def _attends(source: Node) -> bool:
    return any(is_call(user, ops.token_scores) for user in source.users)
