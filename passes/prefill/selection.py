"""The tokens that a layer keeps, as nodes of the graph: scores, positions, and the gathers that the cache gets."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.kernels.budget import Budget
from zipvl_compile.passes.graph.collectives import insert_sum
from zipvl_compile.passes.graph.graph import erase_orphans, insert_call, insert_input, replace
from zipvl_compile.passes.graph.op_calls import GatherTokensCall, SelectTokensCall, TokenScoresCall, outputs
from zipvl_compile.passes.graph.private import fake_mode_of
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.masks.mask_form import CanonicalMasks
from zipvl_compile.passes.match import cache_layers
from zipvl_compile.passes.match.attention_site import Attention
from zipvl_compile.passes.match.outcome import Demanded
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import Site
from zipvl_compile.passes.prefill import ranking
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise.row_select import token_positions

ONE_LATENT = Reason(Why.LATENT_CACHE, 'one selection for all heads despite groups="kv_head": its cache holds latents')
BUDGET = "zipvl_budget"  # the graph's last input, where there is one
LAYERS = "zipvl_layers"  # in its meta: the numbers of the layers that its rows are for


@dataclass(frozen=True)
class Selection:
    """Positions of the kept tokens `[B, G, P]`, and how many probe rows may see each token `[B, n]`."""

    positions: Node
    visible: Node


@dataclass(frozen=True)
class Kept:
    """The tokens that a layer keeps: their keys and values (with spare rows), and how they were selected."""

    keys: Node
    values: Node
    selection: Selection

    @property
    def positions(self) -> Node:
        return self.selection.positions


def budget_input(graph: Graph, like: Node, layers: tuple[int, ...]) -> Node:
    """Return the input of a graph that holds the numbers of each layer's budget; it is made where missing.

    Args:
        like: a node that has a fake tensor.
        layers: the numbers of the layers, a row of `Budget.as_tensor` each.
    """
    for node in graph.find_nodes(op="placeholder", target=BUDGET):
        return node
    numbers, mode = torch.stack([Budget().as_tensor()] * len(layers)), fake_mode_of([example(like)])
    node = insert_input(graph, BUDGET, numbers if mode is None else mode.from_tensor(numbers))
    node.meta[LAYERS] = layers
    return node


def budget_of(before: Node, like: Node, layers: tuple[int, ...], row: int, settings: Settings) -> Node | None:
    """Insert the budget of the layer in a `row` of the graph's budgets; None where it does not change."""
    if not settings.per_request or settings.keeps_all:
        return None
    return insert_call(before, operator.getitem, (budget_input(before.graph, like, layers), row))


def always_kept(site: Site, demanded: Demanded, settings: Settings) -> tuple[Any, Node | None]:
    """Return `keep_recent`, and the positions of further tokens that are always kept, as a node, where there are some.

    `keep_recent` counts tokens that probe rows see. The last probe row sees all but what padding hides, unless the mask
    has a form of its own: there, and where the last row is no probe row, demanded rows are kept by their positions.
    """
    before, least = site.attention.node, settings.keep_recent
    newest, protected = demanded.newest, [*demanded.others]
    seen = settings.recent_probes > 0 and (site.mask is None or not site.mask.needs_matrix or newest == 1)
    if seen and isinstance(newest, Node):
        newest = newest if least == 1 else insert_call(before, torch.sym_max, (newest, least))
    elif seen:
        newest = max(newest, least)
    else:
        start = -newest if isinstance(newest, int) else insert_call(before, operator.neg, (newest,))
        protected.append(token_positions(site.attention.key, slice(start, None), before))
        newest = least
    if len(protected) > 1:
        return newest, insert_call(before, torch.cat, (protected,))
    return newest, protected[0] if protected else None


def select(
    site: Site, attention: Attention, masks: CanonicalMasks, demanded: Demanded, layers: tuple[int, ...], row: int,
    settings: Settings,
) -> Selection:  # fmt: skip
    """Insert scoring and selection before the attention, of the layer in a `row` of the graph's budgets."""
    node, (rows, is_causal) = attention.node, masks.insert(attention)
    key = attention.in_its_dtype(attention.key)
    scores = TokenScoresCall(
        q=attention.query, k=key, mask=rows, is_causal=is_causal, scale=attention.scale, softcap=attention.softcap,
        recent_probes=settings.recent_probes, random_probes=settings.random_probes, seed=settings.probe_seed,
        groups=groups_of(site, settings), even=settings.score == "even",
    )  # fmt: skip
    budget = budget_of(node, key, layers, row, settings)
    return best_of(scores, attention.value, always_kept(site, demanded, settings), site.group, budget, settings, node)


def best_of(
    scores: TokenScoresCall, value: Node, kept: tuple[Any, Node | None], group: str | None, budget: Node | None,
    settings: Settings, before: Node,
) -> Selection:  # fmt: skip
    """Insert scores and the selection of the tokens that they rank highest before a node.

    Args:
        scores: of keys `[B, Hkv, n, D]`.
        value: `[B, Hkv, n, Dv]`.
        kept: how many of the newest tokens are always kept, and the positions of others, see `always_kept`.
        group: the process group whose ranks share the heads; None where one rank has them all.
        budget: numbers of the layer's budget, where they may change from call to call.
    """
    accumulated, visible = outputs(scores.insert(before), before)
    if group is not None:  # the others have scores of their own heads
        accumulated = insert_sum(accumulated, group, before)
    keep_recent, protected = kept
    positions = SelectTokensCall(
        accumulated=accumulated, visible=visible, tau=settings.tau, keep_ratio=settings.keep_ratio,
        keep_recent=keep_recent, protected=protected, keep_tokens=settings.keep_tokens, floor=settings.floor,
        # A token before the first kept one would have nothing to hold.
        keep_first=max(settings.keep_first, int(settings.unselected == "hold")),
        ranking=ranking.insert(accumulated, visible, scores.k, value, settings, before), budget=budget,
    ).insert(before)  # fmt: skip
    return Selection(positions, visible)


def groups_of(site: Site, settings: Settings) -> int:
    """Return how many selections a layer makes: one, or one for each KV head where its cache holds each head's own."""
    assert site.layer is not None
    heads = example(site.attention.key).shape[1]
    if settings.groups == "layer":
        return 1
    each = all(example(gather.x).shape[1] == heads for gather in cache_layers.gathers(site.layer))
    site.note = None if each else ONE_LATENT
    return heads if each else 1


def fits(selection: Selection, attention: Attention) -> bool:
    """Return whether a selection of another layer, which may have other heads, can serve an attention."""
    return example(selection.positions).shape[1] in (1, example(attention.key).shape[1])


def compact(site: Site, attention: Attention, selection: Selection, settings: Settings) -> Kept:
    """Insert the gathers of the kept tokens before the attention; the cache keeps those."""
    layer, node, positions = site.layer, attention.node, selection.positions
    assert layer is not None
    gathers = cache_layers.gathers(layer)
    # One for every buffer of the cache, also where K and V are one tensor: decoding writes into each.
    new_gathers = [] if settings.evict == "keep" else [
        GatherTokensCall(x=old.x, positions=positions, spare=old.spare).insert(node) for old in gathers
    ]  # fmt: skip
    new = {old.x: gather for old, gather in zip(gathers, new_gathers, strict=False)}
    keys, values = (
        attention.in_its_dtype(new.get(x) or GatherTokensCall(x=x, positions=positions, spare=0).insert(node))
        for x in (attention.key, attention.value)
    )
    if new_gathers:
        for follower in cache_layers.followers(layer):
            node.prepend(follower)
        for old, gather in zip(gathers, new_gathers, strict=True):
            assert old.node is not None
            replace(old.node, gather)
        replace(layer, positions)
        erase_orphans([*(old.node for old in gathers), layer])
    return Kept(keys, values, selection)


def keeps_all(kept: Kept, attention: Attention) -> bool:
    """Return whether every token is kept, so that no row of the attention becomes zero."""
    return statically_known_true(example(kept.positions).shape[2] == example(attention.key).shape[2])
