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
    out = residual + zeros.index_copy(positions, o_p)                  | o_p[held_rows(positions, n)]

Exact: every step is proven to treat each token by itself (`tokenwise/axis_rules.py`); where a bias makes the row of an
unselected token another one than zero, that row is computed once (`tokenwise/forward_slice.py`). With
`unselected="hold"` the rows of the others are copies of kept ones. K stays dense, since the scores read it, but where
the layer takes the selection of one before it (`score_every`). What is not proven stays as it was, with the reason.
With `skip="layer"` more is pruned, by another rule (`skip_layers.py`).

Source: ZipVL (arXiv 2410.08584) prunes attention only; the rest follows from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes import skip_layers
from zipvl_compile.passes.demand_rows import narrow_query
from zipvl_compile.passes.graph.graph import erase_unread, size, undone_on_error
from zipvl_compile.passes.graph.graph import replace as replace_node
from zipvl_compile.passes.graph.op_calls import (
    GatherTokensCall,
    HeldRowsCall,
    ProbePositionsCall,
    SparseAttentionCall,
    TokenScoresCall,
    WindowAttentionCall,
    WithRoomCall,
)
from zipvl_compile.passes.graph.reading import arguments, example, is_op
from zipvl_compile.passes.match.outcome import PARTS, Pruning
from zipvl_compile.passes.match.reasons import fault
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.prefill.around import KINDS, Around
from zipvl_compile.passes.prefill.last_row import LAST, has_last_row
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise import forward_slice
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import Cone
from zipvl_compile.passes.tokenwise.row_select import OfEachSample, Shared, kept_rows, rows_of
from zipvl_compile.passes.tokenwise.row_values import ZERO
from zipvl_compile.passes.tokenwise.sole_readers import computed_only_for, raise_rows

Rows = Shared | OfEachSample
EVERY_TOKEN = "every token is kept"


def refusal(site: Site, around: Around | None) -> str:
    """Return why nothing around an attention can be pruned, but for a query; or an empty string."""
    if around is None:
        return f"the attention is dense: {site.needs_true_rows}"
    if WindowAttentionCall.matches(around.node):
        return "every token attends to its window"
    n, kept = example(around.scores.k).shape[2], example(around.positions).shape[2]
    if statically_known_true(kept == n):
        return EVERY_TOKEN
    return "each KV head keeps tokens of its own" if example(around.positions).shape[1] > 1 else ""


def prune_kept(site: Around, node: Node, kept: Rows) -> None:
    """Compute K or V, of which the attention reads `node`, for the kept tokens only.

    Raises:
        Mixes: it is needed in full, or not known to be computed token by token.
    """
    if WithRoomCall.matches(node):
        return  # another attention over the same cache came first
    gather = GatherTokensCall.read(node) if GatherTokensCall.matches(node) else None
    if gather is None or gather.positions is not site.positions:
        raise Mixes("it is not gathered at the kept tokens")
    cone = computed_only_for(gather.x, site.axes, {node})
    new = _compute(cone, kept, node)[gather.x]
    replace_node(node, WithRoomCall(x=new, spare=gather.spare).insert(node))
    erase_unread([node])
    cone.erase()


def _compute(cone: Cone, rows: Rows, before: Node) -> dict[Node, Node]:
    taken = {source: rows.take(source, axes, before) for source, axes in cone.sources.items()}
    return cone.again(taken, rows.count, before)


def prune_queries(site: Around, kept: Rows) -> tuple[Node, Cone]:
    """Compute Q for the probe rows and the kept tokens only.

    Returns:
        Q of the kept tokens, for the attention, and what computes the full one, which only the attention still reads.

    Raises:
        Mixes: Q is needed in full, or not known to be computed token by token.
    """
    if site.all_attend:
        raise Mixes("every query attends")
    cone = computed_only_for(site.query, site.axes, {site.node, site.scores_node})
    query = _compute(cone, kept, site.node)[site.query]
    if site.scores.q is site.query:
        _score_probe_rows(site.scores, cone)
    return query, cone


def prune_demanded_queries(site: Around) -> None:
    """Compute Q for the probe rows and the rows that `demand_rows` left to the attention.

    Raises:
        Mixes: the attention has few queries of its own, or Q is not known to be computed token by token.
    """
    part = site.query
    if not is_op(part, "getitem"):
        raise Mixes("the attention has the newest queries only")
    given = arguments(part)
    query, index = given["input"], given["index"]
    if site.scores.q is not query:
        raise Mixes("the attention has the newest queries only")
    if index[-1] == LAST and has_last_row(site.scores):
        cone = computed_only_for(query, site.axes, {part, site.scores_node})
        _score_probe_rows(site.scores, cone)
        part.replace_input_with(query, site.scores.q)
    else:
        cone = narrow_query(part, site.axes, {site.scores_node})
        _score_probe_rows(site.scores, cone)
    cone.erase()


def _score_probe_rows(scores: TokenScoresCall, cone: Cone) -> None:
    before = scores.node
    assert before is not None
    probes = ProbePositionsCall(
        k=scores.k, recent_probes=scores.recent_probes, random_probes=scores.random_probes, seed=scores.seed
    ).insert(before)
    rows = Shared(probes, size(probes, 0, before))
    replace(scores, q=_compute(cone, rows, before)[scores.q]).write()


def prune_output(site: Around, kept: Rows, query: Node | None) -> str:
    """Compute what follows the attention for the kept tokens only, up to where they meet the others again.

    Args:
        query: that of the kept tokens, if it is at hand.

    Returns:
        why the output projection is not among it, or an empty string.
    """
    attention = site.node
    assert isinstance(site.call, SparseAttentionCall)
    if site.all_attend:
        return "every query attends"
    hold = site.call.queries == "hold"
    below = forward_slice.find(attention, site.axes, hold)
    reason = "" if below.projects else next((below.stops[n] for n in sorted(below.stops)), "there is none")
    if reason and query is None:
        return reason
    if reason:  # nothing is gained below the attention itself
        below = forward_slice.Below(attention, hold, {attention: site.axes}, {attention: ZERO})
    out = attend_kept(site, kept, query)
    tokens = size(site.scores.k, 2, attention)
    below.replace(out, kept, tokens, held(site.positions, tokens, attention) if hold else None)
    return reason


def attend_kept(site: Around, kept: Rows, query: Node | None) -> Node:
    """Insert the attention of the kept tokens alone, `[B, Hq, P, Dv]`; Q of theirs is given if it is at hand."""
    query = query or kept.take(site.query, site.axes, site.node)
    # What it reads now: pruning the values has put others in their place.
    return replace(SparseAttentionCall.read(site.node), q=query).insert(site.node)


def held(positions: Node, tokens: Any, before: Node) -> Rows:
    """Insert which kept token each of the `tokens` holds the row of."""
    index = HeldRowsCall(positions=positions, n=tokens).insert(before)
    return rows_of(index, tokens, before)


def skip_layer(site: Around, kept: Rows, query: Node | None) -> None:
    """Let tokens that are not kept pass the layer; Q of those that are is given if it is at hand.

    Raises:
        Mixes: the layer is computed for every token.
    """
    if site.all_attend:
        raise Mixes("every query attends")
    skip_layers.rewrite(site.node, site.axes, attend_kept(site, kept, query), kept)


def _kept_alone(site: Around, node: Node, kept: Rows, graph: Graph) -> str:
    """Prune K or V; return why not, or an empty string."""
    try:
        with undone_on_error(graph):
            prune_kept(site, node, kept)
    except Exception as why:
        return _said(why)
    return ""


def prune(
    site: Around, kept: Rows, graph: Graph, selects: bool, skips: bool
) -> tuple[dict[str, str], str | None, str | None]:
    """Prune the projections around one attention, or its layer, as far as each is proven.

    Args:
        site: the attention.
        kept: the kept tokens.
        graph: that of both.
        selects: the scores that chose them read its keys.
        skips: tokens that are not kept pass the layer.

    Returns:
        why not, as `Pruning` has it: `reasons`, `skipped` and `keys`.
    """
    query, cone, skipped, reasons = None, None, None, {}
    keys = None if selects else _kept_alone(site, site.keys, kept, graph)
    if reason := _kept_alone(site, site.values, kept, graph):
        reasons["v"] = reason
    try:
        with undone_on_error(graph):
            if site.whole:
                query, cone = prune_queries(site, kept)
            else:  # its output has the demanded rows only
                prune_demanded_queries(site)
    except Exception as why:
        reasons["q"] = _said(why)
    if skips:
        try:
            with undone_on_error(graph):
                if not site.whole:
                    raise Mixes("only some of its rows are needed")
                skip_layer(site, kept, query)
                skipped = ""
        except Exception as why:
            skipped = _said(why)
    if site.whole and skipped != "":
        try:
            with undone_on_error(graph):
                reason = prune_output(site, kept, query)
        except Exception as why:
            reason = _said(why)
        if reason:
            reasons["output"] = reason
    if cone is not None:
        cone.erase()
    return reasons, skipped, keys


def prune_last_query(site: Around, graph: Graph, reason: str) -> dict[str, str]:
    """Prune Q where `demand_rows` left one row of it; all the rest is needed for this reason."""
    reasons = dict.fromkeys(PARTS, reason)
    if not is_op(site.query, "getitem"):
        return reasons
    try:
        with undone_on_error(graph):
            prune_demanded_queries(site)
    except Exception as why:
        return reasons | {"q": _said(why)}
    return {"v": reasons["v"]}


def _said(why: Exception) -> str:
    """Return a refusal; whatever else was raised, as fake values of an operation do, is one, too."""
    return str(why) if isinstance(why, Mixes) else str(fault(why))


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Prune the projections around every attention that was made sparse; note what was pruned and what not."""
    rows: dict[Node, Rows] = {}
    for site in sites.prefill:
        if not site.rewritten:
            continue
        around = Around(site.node) if any(kind.matches(site.node) for kind in KINDS) else None
        if reason := refusal(site, around):
            reasons = dict.fromkeys(PARTS, reason)
            if around is not None and reason != EVERY_TOKEN:
                reasons = prune_last_query(around, graph, reason)
            sites.pruned.append(Pruning(site.name, reasons, reason if site.skips else None))
            continue
        assert around is not None
        if around.positions not in rows:
            rows[around.positions] = kept_rows(around.positions)
        sites.pruned.append(Pruning(site.name, *prune(around, rows[around.positions], graph, site.selects, site.skips)))
        if not site.selects:
            raise_rows(rows[around.positions])
