"""Projections of the tokens that need them only.

Sparse attention reads queries and values of the kept tokens, and gives zero to all others. So most of what is computed
around it for every token is not needed. Before (after `sparsify_prefill`):

    q = rope(linear(h, wq)),  k = rope(linear(h, wk)),  v = linear(h, wv)                          n tokens
    positions = select_tokens(token_scores(q, k, ...))
    keys, values = gather_tokens(k | v, positions, spare)
    out = residual + linear(sparse_attention(q, keys, values, positions, ...), wo)

After:

    q_m = rope(linear(h[probe_positions(k)], wq))                                                  m probe rows
    positions = select_tokens(token_scores(q_m, k, ...))
    q_p, v_p = rope(linear(h[positions], wq)), linear(h[positions], wv)                            P kept tokens
    keys, values = gather_tokens(k, positions, spare), with_room(v_p, spare)
    o_p = linear(sparse_attention(q_p, keys, values, positions, ...), wo)                          P kept tokens
    out = residual + zeros.index_copy(positions, o_p)

Exact: every step is proven to treat each token by itself (`token_axis.py`); where a bias makes the row of an unselected
token another one than zero, that row is computed once (`rows_below.py`). K stays dense, since the scores read it. What
is not proven stays as it was, with the reason.

Source: ZipVL (arXiv 2410.08584) prunes attention only; the rest follows from it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.demand_rows import LAST, has_last_row, narrow_query
from zipvl_compile.passes.graph.graph import args_of, calls, erase_unread, example, insert_call, is_call
from zipvl_compile.passes.match.attention_site import module_path
from zipvl_compile.passes.match.outcome import PARTS, PassReport, Pruning
from zipvl_compile.passes.tokenwise import forward_slice as rows_below
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import Axes, Cone
from zipvl_compile.passes.tokenwise.row_select import OfEachSample, Shared, kept_rows, one_sample, size
from zipvl_compile.passes.tokenwise.sole_readers import computed_only_for

ops = torch.ops.zipvl
Rows = Shared | OfEachSample
_QUERIES = 8  # which argument of sparse_attention
_PROBES = slice(4, 7)  # which arguments of token_scores, after q and k


@dataclass(frozen=True)
class Site:
    """An attention among the kept tokens at `positions`, and the scores that chose them."""

    attention: Node
    positions: Node
    scores: Node

    @property
    def name(self) -> str:
        return self.attention.meta.get("layer") or module_path(self.attention)

    @property
    def query(self) -> Node:
        return args_of(self.attention)[0]

    @property
    def axes(self) -> Axes:
        """Return those of `[B, H, n, D]`."""
        return Axes(2, None if one_sample(self.query) else 0)


def find(graph: Graph) -> list[Site]:
    """Return the attentions that read a selection, in execution order."""
    found = []
    for attention in sorted([*calls(graph, ops.sparse_attention), *calls(graph, ops.decode_attention)]):
        positions = args_of(attention)[3]
        if is_call(positions, ops.select_tokens):
            found.append(Site(attention, positions, args_of(args_of(positions)[0])[0]))
    return found


def is_legal(site: Site) -> str:
    """Return why nothing around the attention can be pruned, or an empty string."""
    n, kept = example(args_of(site.scores)[1]).shape[2], example(site.positions).shape[2]
    return "every token is kept" if statically_known_true(kept == n) else ""


def prune_values(site: Site, kept: Rows) -> None:
    """Compute V for the kept tokens only.

    Raises:
        Mixes: V is needed in full, or not known to be computed token by token.
    """
    gather = args_of(site.attention)[2]
    if is_call(gather, ops.with_room):
        return  # another attention over the same cache came first
    if not is_call(gather, ops.gather_tokens) or args_of(gather)[1] is not site.positions:
        raise Mixes("the values are not gathered at the kept tokens")
    values, _, spare = args_of(gather)
    cone = computed_only_for(values, site.axes, {gather})
    new = _compute(cone, kept, gather)[values]
    gather.replace_all_uses_with(insert_call(gather, ops.with_room.default, (new, spare)))
    erase_unread([gather])
    cone.erase()


def _compute(cone: Cone, rows: Rows, before: Node) -> dict[Node, Node]:
    taken = {source: rows.take(source, axes, before) for source, axes in cone.sources.items()}
    return cone.again(taken, rows.count, before)


def prune_queries(site: Site, kept: Rows) -> tuple[Node, Cone]:
    """Compute Q for the probe rows and the kept tokens only.

    Returns:
        Q of the kept tokens, for the attention, and what computes the full one, which only the attention still reads.

    Raises:
        Mixes: Q is needed in full, or not known to be computed token by token.
    """
    if _all_attend(site.attention):
        raise Mixes("every query attends")
    cone = computed_only_for(site.query, site.axes, {site.attention, site.scores})
    query = _compute(cone, kept, site.attention)[site.query]
    if args_of(site.scores)[0] is site.query:
        _score_probe_rows(site.scores, cone)
    return query, cone


def _all_attend(attention: Node) -> bool:
    return args_of(attention)[_QUERIES] == "all"


def prune_demanded_queries(site: Site) -> None:
    """Compute Q for the probe rows and the rows that `demand_rows` left to the attention.

    Raises:
        Mixes: the attention has few queries of its own, or Q is not known to be computed token by token.
    """
    part = site.query
    if not is_call(part, operator.getitem):
        raise Mixes("the attention has the newest queries only")
    query, index = args_of(part)
    if args_of(site.scores)[0] is not query:
        raise Mixes("the attention has the newest queries only")
    if index[-1] == LAST and has_last_row(site.scores):
        cone = computed_only_for(query, site.axes, {part, site.scores})
        _score_probe_rows(site.scores, cone)
        part.replace_input_with(query, args_of(site.scores)[0])
    else:
        cone = narrow_query(part, site.axes, {site.scores})
        _score_probe_rows(site.scores, cone)
    cone.erase()


def _score_probe_rows(scores: Node, cone: Cone) -> None:
    query, key, *rest = args_of(scores)
    probes = insert_call(scores, ops.probe_positions.default, (key, *rest[_PROBES]))
    rows = Shared(probes, size(probes, 0, scores))
    scores.args = (_compute(cone, rows, scores)[query], key, *rest)


def prune_output(site: Site, kept: Rows, query: Node | None) -> str:
    """Compute what follows the attention for the kept tokens only, up to where they meet the others again.

    Args:
        query: that of the kept tokens, if it is at hand.

    Returns:
        why the output projection is not among it, or an empty string.
    """
    attention = site.attention
    if _all_attend(attention):
        return "every query attends"
    below = rows_below.find(attention, site.axes)
    reason = "" if below.projects else next((below.stops[n] for n in sorted(below.stops)), "there is none")
    if reason and query is None:
        return reason
    if reason:  # nothing is gained below the attention itself
        below = rows_below.Below(attention, {attention: site.axes}, {attention})
    full = site.query
    query = query or kept.take(full, site.axes, attention)
    out = insert_call(attention, ops.sparse_attention.default, (query, *args_of(attention)[1:]))
    below.replace(out, kept, size(args_of(site.scores)[1], 2, attention))
    return reason


def prune(site: Site, kept: Rows) -> Pruning:
    """Prune the projections around one attention, as far as each is proven."""
    query, cone, reasons = None, None, {}
    try:
        prune_values(site, kept)
    except Mixes as why:
        reasons["v"] = str(why)
    demanded = is_call(site.attention, ops.decode_attention)  # its output has the demanded rows only
    try:
        if demanded:
            prune_demanded_queries(site)
        else:
            query, cone = prune_queries(site, kept)
    except Mixes as why:
        reasons["q"] = str(why)
    if not demanded and (reason := prune_output(site, kept, query)):
        reasons["output"] = reason
    if cone is not None:
        cone.erase()
    return Pruning(site.name, reasons)


def apply(graph: Graph) -> PassReport:
    """Prune the projections around every sparse attention of `graph`; report what was pruned and what not."""
    report = PassReport("prune_projections")
    rows: dict[Node, Rows] = {}
    for site in find(graph):
        reason = is_legal(site)
        if not reason and site.positions not in rows:
            rows[site.positions] = kept_rows(site.positions)
        pruning = Pruning(site.name, dict.fromkeys(PARTS, reason)) if reason else prune(site, rows[site.positions])
        report.pruned.append(pruning)
    return report
