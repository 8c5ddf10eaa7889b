"""Every attention of a graph, matched once; the passes read its site and write into it what became of it.

graph ──> match ──> Sites(prefill, decode, others) ──> pass after pass ──> outcomes of the report
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.masks.mask_form import CanonicalMasks, MaskForm
from zipvl_compile.passes.match import cache_layers, eager, left_dense, sdpa
from zipvl_compile.passes.match.attention_site import Attention, AttentionShape
from zipvl_compile.passes.match.near_miss import FLEX_ATTENTION, NearMiss
from zipvl_compile.passes.match.outcome import Demand, Demanded, Kind, Pruning, SiteOutcome
from zipvl_compile.passes.match.reasons import Reason

log = logging.getLogger("zipvl_compile")
FLEX = torch.ops.higher_order.flex_attention
_FLEX_IS_CODE = "its mask and scores are functions (mask_mod, score_mod), not tensors"


@dataclass(eq=False)
class Site:
    """One attention on its way through the passes.

    Attributes:
        attention: as it was matched; `Attention.as_it_stands` follows the replacements of passes.
        kind: "prefill" or "decode" of a KV cache, "other" without one.
        layer: `token_positions` of the cache layer that a prefill fills, else None.
        node: what gives the attention's output now.
        rewritten: whether a pass made it sparse, or read a compacted cache.
        reason: why it stays dense, once that is known.
        note: what was not done to it, though it was rewritten.
        selects: whether it computes scores of its own, which read all keys.
        skips: whether tokens that it does not keep should pass its layer.
        group: the process group whose ranks share its heads; None where one rank has them all.
        later_part: marker of what is in memory once a later part of a prompt was appended, of a decode site; else None.
        noted: the queries of the newest tokens, of a decode site whose layer keeps them for a re-selection; else None.
        needs_true_rows: why what reads its output cannot take rows of zeros; empty where it can.
        mask, shape: what a prefill's mask computes and what its cost depends on, where a pass asked.
    """

    attention: Attention
    kind: Kind
    layer: Node | None = None
    node: Node = field(init=False)
    name: str = field(init=False)
    rewritten: bool = False
    selects: bool = True
    skips: bool = False
    group: str | None = None
    later_part: Node | None = None
    noted: Node | None = None
    reason: Reason | None = None
    needs_true_rows: str = ""
    note: Reason | None = None
    mask: MaskForm | None = None
    shape: AttentionShape | None = None

    def __post_init__(self) -> None:
        self.node, self.name = self.attention.node, self.attention.name

    @property
    def outcome(self) -> SiteOutcome:
        """Return what the report says of it."""
        mask = "" if self.mask is None else str(self.mask)
        return SiteOutcome(self.name, self.kind, self.reason, mask, self.shape, self.note)


@dataclass
class Sites:
    """The attentions of one graph, each kind in execution order, and what else the passes found.

    Attributes:
        prefill: attentions whose K and V a cache layer stores.
        decode: attentions that read a compacted cache.
        others: every other attention, with the reason why no pass considers it.
        unread: cache layers that none of these reads, and what resembles attention, as the report names them.
        near_misses: what no pattern matches though it resembles one.
        masks: what the masks of the sites compute.
        pruned, demands: what is computed around the attentions that were rewritten.
        demanded: the rows whose hidden states are read after the last layer; the newest one unless a pass looked.
    """

    prefill: list[Site] = field(default_factory=list)
    decode: list[Site] = field(default_factory=list)
    others: list[Site] = field(default_factory=list)
    unread: list[SiteOutcome] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    masks: CanonicalMasks = field(default_factory=CanonicalMasks)
    pruned: list[Pruning] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    demanded: Demanded = field(default_factory=Demanded)

    def __iter__(self) -> Iterator[Site]:
        return iter([*self.prefill, *self.decode, *self.others])

    @property
    def dense(self) -> list[Site]:
        """Return the sites whose attention is still in the graph as it was matched."""
        return [site for site in self if site.node is site.attention.node and not site.node._erased]

    @property
    def outcomes(self) -> list[SiteOutcome]:
        """Return what the report says of every site."""
        return [*(site.outcome for site in self), *self.unread]

    def at(self, node: Node) -> Site | None:
        """Return the site whose attention a node computes now."""
        return next((site for site in self if site.node is node), None)


def match(graph: Graph) -> Sites:
    """Return every attention of a graph, each where it belongs; those of no pass with the reason."""
    attentions, misses = read_all(graph)
    prefill = cache_layers.filled_by(graph, attentions)
    decode = cache_layers.shown_to(graph, attentions)
    sites = Sites(near_misses=misses)
    sites.prefill = [Site(form, "prefill", layer) for form, layer in prefill.values()]
    sites.decode = [Site(form, "decode", later_part=cache_layers.later_part_of(form)) for form in decode.values()]
    rest = [one for one in attentions if one.node not in prefill and one.node not in decode]
    claimed = {site.layer or site.later_part for site in (*sites.prefill, *sites.decode)}
    claimed |= {view.node for one in decode.values() for view in cache_layers.views_above(one) if view.node is not None}
    unread = left_dense.unread_layers(graph, attentions, misses, claimed)
    explained = {nearest.node for _, nearest in unread if nearest is not None}
    rest = [one for one in rest if one.node not in explained]
    for attention, (kind, reason) in zip(rest, left_dense.classify_all(rest), strict=True):
        site = Site(attention, kind)
        site.reason = reason
        sites.others.append(site)
    sites.unread = [outcome for outcome, _ in unread]
    sites.unread += [
        SiteOutcome(miss.name, *left_dense.read_alone(miss))
        for miss in misses
        if miss.listed_alone and miss.node not in explained
    ]
    return sites


def read_all(graph: Graph) -> tuple[list[Attention], list[NearMiss]]:
    """Return the attentions of a graph, and what resembles one and is none, in execution order."""
    attentions: list[Attention] = []
    misses: list[NearMiss] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is FLEX:
            misses.append(NearMiss(node, FLEX_ATTENTION, _FLEX_IS_CODE))
            continue
        form = sdpa if is_op(node, "scaled_dot_product_attention") else eager if eager.is_softmax(node) else None
        if form is None:
            continue
        try:
            attentions.append(form.read(node))
        except sdpa.Differs as difference:
            misses.append(NearMiss(node, form.NAME, str(difference)))
        except Exception as error:  # a fault of ours must not break the user's compile
            log.debug("zipvl cannot read %s", node.format_node(), exc_info=True)
            misses.append(NearMiss(node, form.NAME, f"zipvl failed to read it ({type(error).__name__}: {error})"))
    return attentions, misses
