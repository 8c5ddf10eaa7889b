"""Decode: attend over the physical tokens of a compacted cache.

Before (the cache layer traced `kv_view`, a tensor of logical length `n` that only tracing needs):

    append_tokens(key_buffer, value_buffer, k, v, at)                                    in place
    out = sdpa(q, repeat_heads(kv_view(key_buffer, positions, prompt, n)),
                  repeat_heads(kv_view(value_buffer, positions, prompt, n)), mask)

After:

    append_tokens(key_buffer, value_buffer, k, v, at)
    out = decode_attention(q, key_buffer, value_buffer, positions, prompt, n, mask, scale, softcap)

Source: decoding over the KV cache of important tokens, arXiv 2410.08584.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from zipvl_compile.kernels import decode_attention as _decode  # noqa: F401  (registers the operators)
from zipvl_compile.kernels import kv_view as _view  # noqa: F401
from zipvl_compile.passes import attention_site, normalize_attention
from zipvl_compile.passes.attention_site import AttentionSite
from zipvl_compile.passes.graph_edit import example, insert_call, is_call
from zipvl_compile.passes.masks import four_axes
from zipvl_compile.passes.pass_report import PassReport, SiteOutcome

ops = torch.ops.zipvl


def find(graph: Graph) -> list[AttentionSite]:
    """Return the sites whose keys and values are views of a compacted cache."""
    return [
        site
        for site in normalize_attention.find(graph)
        if is_call(site.key, ops.kv_view) and is_call(site.value, ops.kv_view)
    ]


def is_legal(site: AttentionSite) -> str:
    """Return why the site must keep reading the logical view, or an empty string."""
    if site.key.args[1:] != site.value.args[1:]:
        return "keys and values come from different cache layers"
    if site.dropout:
        return f"attention dropout {site.dropout}: the model is training"
    if site.is_causal:
        return "is_causal aligns queries with the first keys, not with the last"
    if not attention_site.mask_fits(site):
        return f"mask of shape {list(example(site.mask).shape)} is not [batch, heads, queries, keys]"
    return ""


def rewrite(site: AttentionSite) -> None:
    """Put `decode_attention` over the physical buffers in the place of the site."""
    keys, positions, prompt, n = site.key.args
    values = site.value.args[0]
    mask = None if site.mask is None else four_axes(site.mask, site.node, site.mask_hides)
    out = insert_call(
        site.node,
        ops.decode_attention.default,
        (site.query, keys, values, positions, prompt, n, mask, site.scale, site.softcap),
    )
    site.replace_with(out)


def apply(graph: Graph) -> PassReport:
    """Rewrite every legal decode site of `graph`; report the others with their reasons."""
    report = PassReport("read_compact_cache")
    for site in find(graph):
        reason = is_legal(site)
        report.sites.append(SiteOutcome(site.name, "decode", reason))
        if not reason:
            rewrite(site)
    return report
