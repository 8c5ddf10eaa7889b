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
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.kernels import gather_tokens as _gather  # noqa: F401  (registers the operators)
from zipvl_compile.kernels import select_tokens as _select  # noqa: F401
from zipvl_compile.kernels import sparse_attention as _attend  # noqa: F401
from zipvl_compile.kernels import token_scores as _score  # noqa: F401
from zipvl_compile.passes import attention_site
from zipvl_compile.passes.attention_site import AttentionSite
from zipvl_compile.passes.graph_edit import calls, erase_orphans, example, insert_call, is_call
from zipvl_compile.passes.pass_report import PassReport, SiteOutcome
from zipvl_compile.passes.token_source import is_cross_attention

ops = torch.ops.zipvl


def find(graph: Graph) -> list[tuple[AttentionSite, Node]]:
    """Return the sites whose K and V go into a cache layer, each with its `token_positions` node."""
    markers = {node.args[0]: node for node in calls(graph, ops.token_positions)}
    return [
        (form, markers[form.key])
        for site in attention_site.find(graph)
        for form in (site,) + (() if site.key is site.inputs[0] else (site.as_read(),))
        if form.key in markers and _gathers_of(form.value, markers[form.key])
    ]


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
    return "" if n >= min_tokens else f"prompt shorter than min_tokens={min_tokens}"


def is_legal(site: AttentionSite, positions: Node, readers: int) -> str:
    """Return why the site must stay dense, or an empty string."""
    q, k = example(site.query), example(site.key)
    if site.dropout:
        return f"attention dropout {site.dropout}: the model is training"
    if readers > 1:
        return f"shared KV: {readers} attentions read this layer's cache"
    if any(attention_site.changed_in_place(x) for x in (site.key, site.value)):
        return "keys or values are changed in place"
    if not _only_cached(positions):
        return "the layer's cache is read again in the same graph"
    if not statically_known_true(q.shape[2] == k.shape[2]):
        return f"{q.shape[2]} queries over {k.shape[2]} keys: not the prefill of a whole prompt"
    if not statically_known_true(q.shape[0] == k.shape[0]):
        return f"batch {q.shape[0]} of queries over batch {k.shape[0]} of keys"
    if is_cross_attention(site):
        return "cross-attention: queries and keys come from different hidden states"
    if site.mask is None and not site.is_causal:
        return "no causal mask: cross-attention or an encoder"
    if not attention_site.mask_fits(site):
        return f"mask of shape {list(example(site.mask).shape)} is not [batch, heads, queries, keys]"
    return ""


def rewrite(
    site: AttentionSite,
    marker: Node,
    *,
    tau: float,
    keep_ratio: float | None,
    recent: int,
    random: int,
    seed: int,
    keep_recent: int,
    all_queries: bool,
    drop: bool,
) -> None:
    """Put scoring, selection and sparse attention in the place of the site's dense attention."""
    node = site.node
    scored = insert_call(
        node,
        ops.token_scores.default,
        (site.query, site.key, site.mask, site.is_causal, site.scale, recent, random, seed, 1),
    )
    accumulated = insert_call(node, operator.getitem, (scored, 0))
    visible = insert_call(node, operator.getitem, (scored, 1))
    positions = insert_call(node, ops.select_tokens.default, (accumulated, visible, tau, keep_ratio, keep_recent))
    cached = [_gathers_of(site.key, marker)[0], _gathers_of(site.value, marker)[-1]]
    spare = cached[0].args[2] if drop else 0
    kept = [insert_call(node, ops.gather_tokens.default, (x, positions, spare)) for x in (site.key, site.value)]
    if drop:
        for old, new in zip([*cached, marker], [*kept, positions], strict=True):
            old.replace_all_uses_with(new)
        erase_orphans([*cached, marker])
    out = insert_call(
        node,
        ops.sparse_attention.default,
        (site.query, *kept, positions, site.mask, site.is_causal, site.scale, all_queries),
    )
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    erase_orphans(site.inputs)


def apply(graph: Graph, *, min_tokens: int, **selection) -> PassReport:
    """Rewrite every legal prefill site of `graph`; report the others with their reasons.

    Args:
        min_tokens: shorter prompts stay dense (tokens).
        selection: keyword arguments of `rewrite`.
    """
    report = PassReport("sparsify_prefill")
    found = find(graph)
    for site, marker in found:
        readers = sum(1 for _, other in found if other is marker)
        short = is_short(site, min_tokens)
        reason = short or is_legal(site, marker, readers)
        report.sites.append(SiteOutcome(site.name, "prefill", reason, by_design=bool(short)))
        if not reason:
            rewrite(site, marker, **selection)
    return report
