"""Dense attention of a whole prompt, without a mask in memory where a causal flag says the same.

transformers gives every attention that it traces a mask, `[B, 1, n, n]`. Attention that reads it computes the half that
causality hides, too, and has slower kernels. Before, in a layer that stays dense:

    out = sdpa(q, repeat_heads(k), repeat_heads(v), causal & padding[:, None, None, :])

After:

    out = sparse_attention(q, k, v, token_positions(k), hiding_rows(padding), is_causal=True)

Every token is among those that attend and are attended to, so it is the same attention. Runs after the passes that
narrow what is computed for a few rows, which know scaled_dot_product_attention.
"""

from __future__ import annotations

import torch
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.kernels import gather_tokens as _gather  # noqa: F401  (registers the operators)
from zipvl_compile.kernels import sparse_attention as _attend  # noqa: F401
from zipvl_compile.passes.graph.graph import example, insert_call
from zipvl_compile.passes.masks.mask_form import CanonicalMasks
from zipvl_compile.passes.match import sdpa as normalize_attention
from zipvl_compile.passes.match.attention_site import AttentionSite
from zipvl_compile.passes.sparsify_prefill import is_readable
from zipvl_compile.passes.tokenwise.sole_readers import under_autocast

ops = torch.ops.zipvl
LEAST = 512  # tokens; of shorter prompts the mask costs less than a call of our operator does on a CPU


def find(graph: Graph, masks: CanonicalMasks) -> list[AttentionSite]:
    """Return the attentions whose masks say no more than a causal flag and a row of padding."""
    autocast = under_autocast(graph)
    return [
        site
        for site in normalize_attention.find(graph)
        if site.mask is not None and site.node not in autocast and _is_causal(site, masks)
    ]


def _is_causal(site: AttentionSite, masks: CanonicalMasks) -> bool:
    q, k = example(site.query), example(site.key)
    if not statically_known_true(q.shape[2] == k.shape[2]) or statically_known_true(k.shape[2] == 1):
        return False
    form = masks.form(site)
    return "causal" in form.parts and not form.needs_matrix and not is_readable(site)


def apply(graph: Graph) -> None:
    """Replace the attentions of `find` over at least `LEAST` tokens, which becomes a guard of the compiled graph."""
    masks = CanonicalMasks()
    for site in find(graph, masks):
        if example(site.key).shape[2] < LEAST:
            continue
        rows, is_causal = masks.hiding(site)
        everyone = insert_call(site.node, ops.token_positions.default, (site.key,))
        given = (site.query, site.key, site.value, everyone, rows, is_causal, site.scale, site.softcap, "selected")
        site.replace_with(insert_call(site.node, ops.sparse_attention.default, given))
    masks.erase_unread()
