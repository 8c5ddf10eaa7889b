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

With `drop=False` the cache keeps its full-length nodes, and the attention gets gathers of its own.

Where the cache holds latents (MLA), K and V are computed from them token by token: the cache keeps the latents of the
kept tokens, and the attention reads gathers of K and V.

Several attentions may read the K and V of one cache layer (shared KV: Gemma 3n, Gemma 4). The first one selects; the
others attend among the same kept tokens, since the cache will hold no others when they decode.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.kernels import decode_attention as _decode  # noqa: F401  (registers the operators)
from zipvl_compile.kernels import gather_tokens as _gather  # noqa: F401
from zipvl_compile.kernels import select_tokens as _select  # noqa: F401
from zipvl_compile.kernels import sparse_attention as _attend  # noqa: F401
from zipvl_compile.kernels import token_scores as _score  # noqa: F401
from zipvl_compile.passes.cost_model import NEVER, AttentionShape
from zipvl_compile.passes.graph.graph import calls, erase_orphans, example, insert_call, is_call
from zipvl_compile.passes.masks.mask_form import CanonicalMasks, MaskForm, four_axes
from zipvl_compile.passes.match import attention_site
from zipvl_compile.passes.match import sdpa as normalize_attention
from zipvl_compile.passes.match.attention_site import AttentionSite
from zipvl_compile.passes.match.cross_attention import CROSS_ATTENTION, is_cross_attention
from zipvl_compile.passes.match.outcome import PassReport, SiteOutcome
from zipvl_compile.passes.tokenwise.backward_slice import first_computed_from

ops = torch.ops.zipvl
LeastTokens = Callable[[AttentionShape, torch.dtype, torch.device], int]


def find(graph: Graph) -> list[tuple[AttentionSite, Node]]:
    """Return the sites whose K and V go into a cache layer, each with its `token_positions` node."""
    markers = {node.args[0]: node for node in calls(graph, ops.token_positions)}
    sites = normalize_attention.find(graph)
    found = {
        form.node: (form, markers[form.key])
        for site in sites
        for form in (site,) + (() if site.key is site.inputs[0] else (site.as_read(),))
        if form.key in markers and _gathers_of(form.value, markers[form.key])
    }
    read = {marker for _, marker in found.values()}
    stored = {marker: cached_by(marker) for marker in markers.values()}
    for marker, sources in stored.items():
        if marker in read or (site := first_computed_from(sources, sites)) is None:
            continue
        others = {x for other, tensors in stored.items() if other is not marker for x in tensors}
        if site.node not in found and others.isdisjoint({site.key, site.value, *site.inputs}):
            found[site.node] = (site, marker)
    return [found[site.node] for site in sites if site.node in found]


def cached_by(marker: Node) -> list[Node]:
    """Return what a cache layer stores: keys and values, or the latents that they are computed from."""
    return [user.args[0] for user in marker.users if is_call(user, ops.gather_tokens)]  # type: ignore[misc]


def _gathers_of(x: Node, positions: Node) -> list[Node]:
    """Return the nodes that put the tokens of `x` at `positions` into the cache: two where K and V are one tensor."""
    return [user for user in positions.users if is_call(user, ops.gather_tokens) and user.args[0] is x]


def _only_cached(marker: Node) -> bool:
    """Return whether nothing but the graph's outputs reads the cache that `marker` stands for."""
    gathers = [user for user in marker.users if user.op != "output"]
    readers = [user for gather in gathers for user in gather.users]
    return all(is_call(g, ops.gather_tokens) for g in gathers) and all(u.op == "output" for u in readers)


def is_short(site: AttentionSite, min_tokens: int) -> str:
    """Return that the prompt is too short to gain, or an empty string.

    `n >= min_tokens` becomes a guard of the compiled graph: a shorter prompt compiles once, dense.
    """
    n = example(site.key).shape[2]
    if statically_known_true(n == 1):
        return "prompt of one token"
    if min_tokens >= NEVER:
        return "keeping every token gains nothing over dense attention"
    return "" if n >= min_tokens else f"prompt shorter than min_tokens={min_tokens}"


def is_legal(site: AttentionSite, positions: Node) -> str:
    """Return why the site must stay dense, or an empty string."""
    q, k = example(site.query), example(site.key)
    cached = site.key is positions.args[0]  # else it is computed from the cache's latents, which TokenRows checks
    if cached and any(attention_site.changed_in_place(x) for x in (site.key, site.value)):
        return "keys or values are changed in place"
    if not _only_cached(positions):
        return "the layer's cache is read again in the same graph"
    if is_cross_attention(site):
        return CROSS_ATTENTION
    if not statically_known_true(q.shape[2] == k.shape[2]):
        return f"{q.shape[2]} queries over {k.shape[2]} keys: not the prefill of a whole prompt"
    if unreadable := is_readable(site):
        return unreadable
    if site.mask is None and not site.is_causal:
        return "no causal mask: cross-attention or an encoder"
    return ""


def is_readable(site: AttentionSite) -> str:
    """Return why the operators cannot read the site's inputs, or an empty string."""
    q, k = example(site.query), example(site.key)
    if site.dropout:
        return f"attention dropout {site.dropout}: the model is training"
    if not statically_known_true(q.shape[0] == k.shape[0]):
        return f"batch {q.shape[0]} of queries over batch {k.shape[0]} of keys"
    if not attention_site.mask_fits(site):
        return f"mask of shape {list(example(site.mask).shape)} is not [batch, heads, queries, keys]"
    return ""


def is_legal_reader(site: AttentionSite, owner: AttentionSite) -> str:
    """Return why a further attention over the same keys and values must stay dense, or an empty string."""
    if (site.key, site.value) != (owner.key, owner.value):
        return "shared KV: this attention reads the keys and values of two cache layers"
    if site.is_causal and not _reads_whole_prompt(site):
        return "is_causal aligns queries with the first keys, not with the last"
    return is_readable(site)


def _reads_whole_prompt(site: AttentionSite) -> bool:
    return statically_known_true(example(site.query).shape[2] == example(site.key).shape[2])


def shape_of(site: AttentionSite, form: MaskForm, probes: int, every_query: bool) -> AttentionShape:
    """Return what the site's cost depends on; a batch of symbolic size counts as one sample."""
    q, k, v = (example(x) for x in (site.query, site.key, site.value))
    batch = q.shape[0] if isinstance(q.shape[0], int) else 1
    sizes = (batch, q.shape[1], k.shape[1], q.shape[3], v.shape[3], probes, q.element_size())
    return AttentionShape(*sizes, every_query, site.mask is not None, site.mask is not None and form.needs_matrix)


@dataclass(frozen=True)
class Selection:
    """Which tokens to keep, and what for: see `ZipVLOptions`."""

    tau: float
    keep_ratio: float | None
    recent: int
    random: int
    seed: int
    keep_recent: int
    all_queries: bool
    drop: bool


@dataclass(frozen=True)
class Kept:
    """The tokens that a layer keeps: their keys, values (with spare rows) and positions."""

    keys: Node
    values: Node
    positions: Node


def select(site: AttentionSite, marker: Node, mask: tuple[Node | None, bool], chosen: Selection) -> Kept:
    """Insert scoring, selection and compaction before the site; the cache keeps the kept tokens."""
    node, (rows, is_causal) = site.node, mask
    probes = (chosen.recent, chosen.random, chosen.seed)
    arguments = (site.query, site.key, rows, is_causal, site.scale, site.softcap, *probes, 1)
    scored = insert_call(node, ops.token_scores.default, arguments)
    accumulated = insert_call(node, operator.getitem, (scored, 0))
    visible = insert_call(node, operator.getitem, (scored, 1))
    rule = (chosen.tau, chosen.keep_ratio, chosen.keep_recent)
    positions = insert_call(node, ops.select_tokens.default, (accumulated, visible, *rule))
    stored = [user for user in marker.users if is_call(user, ops.gather_tokens)]
    new: dict[Node, Node] = {}
    if chosen.drop:
        for old in stored:
            source, _, spare = old.args
            new[source] = insert_call(node, ops.gather_tokens.default, (source, positions, spare))  # type: ignore[index]
            old.replace_all_uses_with(new[source])  # type: ignore[index]
        marker.replace_all_uses_with(positions)
        erase_orphans([*stored, marker])
    keys, values = (
        new.get(x) or insert_call(node, ops.gather_tokens.default, (x, positions, 0)) for x in (site.key, site.value)
    )
    return Kept(keys, values, positions)


def attend(site: AttentionSite, kept: Kept, masks: CanonicalMasks, all_queries: bool) -> None:
    """Put attention among the kept tokens in the place of the site's dense attention."""
    if _reads_whole_prompt(site):
        rows, is_causal = masks.hiding(site)
        target = ops.sparse_attention.default
        where: tuple = (kept.positions, rows, is_causal, site.scale, site.softcap, "all" if all_queries else "selected")
    else:  # a reader of shared KV that has the newest queries only: it attends as if it decoded
        n = example(site.key).shape[2]
        n = n if isinstance(n, int) else insert_call(site.node, torch.ops.aten.sym_size.int, (site.key, 2))
        mask = None if site.mask is None else four_axes(site.mask, site.node, site.mask_hides)
        target = ops.decode_attention.default
        where = (kept.positions, n, n, mask, site.scale, site.softcap)
    out = insert_call(site.node, target, (site.query, kept.keys, kept.values, *where))
    out.meta["layer"] = site.name  # for reports: where Dynamo lost the module, the name is that of the first node
    site.replace_with(out)


def apply(graph: Graph, *, min_tokens: int | LeastTokens, **selection) -> PassReport:
    """Rewrite every legal prefill site of `graph`; report the others with their reasons.

    Args:
        min_tokens: shorter prompts stay dense (tokens); or what gives it for an attention of a shape, dtype and device.
        selection: fields of `Selection`.
    """
    report = PassReport("sparsify_prefill")
    chosen, masks = Selection(**selection), CanonicalMasks()
    layers: dict[Node, tuple[AttentionSite, Kept] | None] = {}
    for site, marker in find(graph):
        reads_first = marker not in layers
        form = masks.form(site)
        shape = shape_of(site, form, chosen.recent + chosen.random, chosen.all_queries)
        query = example(site.query)
        least = min_tokens if isinstance(min_tokens, int) else min_tokens(shape, query.dtype, query.device)
        short = is_short(site, least)
        if reads_first:
            reason = short or is_legal(site, marker)
        elif layers[marker] is None:
            reason = short or "shared KV: the first attention over this layer's cache stays dense"
        else:
            reason = is_legal_reader(site, layers[marker][0])  # type: ignore[index]
        by_design = bool(short) or reason == CROSS_ATTENTION
        report.sites.append(SiteOutcome(site.name, "prefill", reason, by_design, str(form), shape))
        if reason:
            layers.setdefault(marker, None)
            continue
        if reads_first:
            layers[marker] = (site, select(site, marker, masks.insert(site), chosen))
        attend(site, layers[marker][1], masks, chosen.all_queries)  # type: ignore[index]
    masks.erase_unread()
    return report
