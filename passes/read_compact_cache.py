"""Decode: attend over the physical tokens of a compacted cache.

Before (the cache layer traced `kv_view`, a tensor of logical length `n` that only tracing needs):

    append_tokens(key_buffer, value_buffer, k, v, at)                                    in place
    out = sdpa(q, repeat_heads(kv_view(key_buffer, positions, prompt, n)),
                  repeat_heads(kv_view(value_buffer, positions, prompt, n)), mask)

After:

    append_tokens(key_buffer, value_buffer, k, v, at)
    out = decode_attention(q, key_buffer, value_buffer, positions, prompt, n, mask, scale, softcap)

Where the cache holds latents (MLA), keys and values are computed again from the latents in memory:

    k, v = expand(kv_view(latents, ...))      becomes      k, v = expand(latents[:, :, : cached tokens])

Source: decoding over the KV cache of important tokens, arXiv 2410.08584.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from zipvl_compile.kernels import decode_attention as _decode  # noqa: F401  (registers the operators)
from zipvl_compile.kernels import kv_view as _view  # noqa: F401
from zipvl_compile.passes.graph.graph import calls, erase_orphans, example, insert_call, is_call, op_name
from zipvl_compile.passes.masks.mask_form import four_axes
from zipvl_compile.passes.match import attention_site
from zipvl_compile.passes.match import sdpa as normalize_attention
from zipvl_compile.passes.match.attention_site import AttentionSite
from zipvl_compile.passes.match.outcome import PassReport, SiteOutcome
from zipvl_compile.passes.tokenwise.backward_slice import Cone, TokenRows, first_computed_from

ops = torch.ops.zipvl


def find(graph: Graph) -> list[AttentionSite]:
    """Return the sites whose keys and values are views of a compacted cache, or computed from such views."""
    sites, views = normalize_attention.find(graph), calls(graph, ops.kv_view)
    direct = [site for site in sites if site.key in views and site.value in views]
    read = {view for site in direct for view in (site.key, site.value)}
    layers: dict[tuple, list[Node]] = {}
    for view in views:
        if view not in read:
            layers.setdefault(view.args[1:], []).append(view)
    computed = [site for group in layers.values() if (site := first_computed_from(group, sites)) is not None]
    return [site for site in sites if site in direct or site in computed]


def is_legal(site: AttentionSite) -> str:
    """Return why the site must keep reading the logical view, or an empty string."""
    if len({view.args[1:] for view in _views_above(site)}) > 1:
        return "keys and values come from different cache layers"
    if site.dropout:
        return f"attention dropout {site.dropout}: the model is training"
    if site.is_causal:
        return "is_causal aligns queries with the first keys, not with the last"
    if not attention_site.mask_fits(site):
        return f"mask of shape {list(example(site.mask).shape)} is not [batch, heads, queries, keys]"
    return ""


def _views_above(site: AttentionSite) -> list[Node]:
    """Return the views of the cache that the site's keys and values are, or are computed from."""
    if is_call(site.key, ops.kv_view):
        return [site.key, site.value]
    views, seen, todo = [], set(), [site.key, site.value]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, ops.kv_view):
            views.append(node)
        else:
            written = [w for part in node.users for w in part.users if op_name(w) == "copy_"]
            todo += [*node.all_input_nodes, *(x for write in written for x in write.all_input_nodes)]
    return views


def rewrite(site: AttentionSite) -> None:
    """Put `decode_attention` over the physical buffers in the place of the site."""
    _, positions, prompt, n = site.key.args if is_call(site.key, ops.kv_view) else _views_above(site)[0].args
    mask = None if site.mask is None else four_axes(site.mask, site.node, site.mask_hides)
    views = _views_above(site)
    latents = None if is_call(site.key, ops.kv_view) else TokenRows(views).cone((site.key, site.value))
    if latents is None:
        keys, values = site.key.args[0], site.value.args[0]
    else:
        keys, values = _computed_again(latents, site, positions, prompt, n)
    out = insert_call(
        site.node,
        ops.decode_attention.default,
        (site.query, keys, values, positions, prompt, n, mask, site.scale, site.softcap),
    )
    site.replace_with(out)
    if latents is not None:
        latents.erase()
        erase_orphans(views)


def _computed_again(latents: Cone, site: AttentionSite, positions: Any, prompt: Any, n: Any) -> list[Node]:
    """Compute keys and values from the latents in memory instead of those of every logical token."""
    kept = insert_call(site.node, torch.ops.aten.sym_size.int, (positions, 2))
    later = insert_call(site.node, operator.sub, (n, prompt))
    count = insert_call(site.node, operator.add, (kept, later))
    everything = (slice(None), slice(None), slice(None, count))
    rows = {view: insert_call(site.node, operator.getitem, (view.args[0], everything)) for view in latents.sources}
    new = latents.again(rows, count, site.node)
    return [new[site.key], new[site.value]]


def apply(graph: Graph) -> PassReport:
    """Rewrite every legal decode site of `graph`; report the others with their reasons."""
    report = PassReport("read_compact_cache")
    for site in find(graph):
        reason = is_legal(site)
        report.sites.append(SiteOutcome(site.name, "decode", reason))
        if not reason:
            rewrite(site)
    return report
