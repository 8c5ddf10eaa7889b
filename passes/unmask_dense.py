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

from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import undone_on_error
from zipvl_compile.passes.graph.op_calls import SparseAttentionCall, TokenPositionsCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.masks.mask_form import CanonicalMasks
from zipvl_compile.passes.match.attention_site import Attention
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.prefill.refusals import unreadable_inputs
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.sole_readers import under_autocast

LEAST = 512  # tokens; of shorter prompts the mask costs less than a call of our operator does on a CPU


def find(graph: Graph, sites: Sites, masks: CanonicalMasks) -> list[Site]:
    """Return the dense attentions whose masks say no more than a causal flag and a row of padding."""
    autocast = under_autocast(graph)
    return [
        site
        for site in sites.dense
        if site.attention.mask is not None
        and site.node not in autocast
        and _is_causal(site.attention.as_it_stands(), masks)
    ]


def _is_causal(attention: Attention, masks: CanonicalMasks) -> bool:
    if not attention.reads_whole_prompt or statically_known_true(example(attention.key).shape[2] == 1):
        return False
    form = masks.form(attention)
    return form.is_causal and not form.needs_matrix and unreadable_inputs(attention) is None


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Replace the attentions of `find` over at least `LEAST` tokens, which becomes a guard of the compiled graph."""
    masks = CanonicalMasks()  # its own: what the sites' masks were read from may be gone
    for site in find(graph, sites, masks):
        attention = site.attention.as_it_stands()
        if example(attention.key).shape[2] < LEAST:
            continue
        with undone_on_error(graph):
            rows, is_causal = masks.hiding(attention)
            everyone = TokenPositionsCall(k=attention.key).insert(attention.node)
            site.node = attention.replace_with(
                SparseAttentionCall(
                    q=attention.query, k=attention.key, v=attention.value, positions=everyone, mask=rows,
                    is_causal=is_causal, scale=attention.scale, softcap=attention.softcap, queries="selected",
                ).insert(attention.node)
            )  # fmt: skip
    masks.erase_unread()
