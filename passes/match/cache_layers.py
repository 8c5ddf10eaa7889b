"""Which attention reads which layer of the KV cache.

The cache layers traced markers: in a prefill `token_positions` and the gathers of what a layer stores, in decoding a
`kv_view` of every buffer. An attention reads a layer where its keys and values are what the layer stores or shows, or
are computed from that token by token, as those of latent attention (MLA) are.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from zipvl_compile.passes.graph.evicted_calls import OtherTokensCall, QuantiseTokensCall, RestoreTokensCall, ToHostCall
from zipvl_compile.passes.graph.graph import is_call
from zipvl_compile.passes.graph.op_calls import (
    FixedPositionsCall,
    FixedRowsCall,
    GatherTokensCall,
    KVViewCall,
    RowCountCall,
    TokenPositionsCall,
)
from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.match.attention_site import Attention
from zipvl_compile.passes.tokenwise.backward_slice import TokenRows


def gathers(marker: Node) -> list[GatherTokensCall]:
    """Return the calls that put what a layer stores into the cache."""
    return [GatherTokensCall.read(user) for user in marker.users if GatherTokensCall.matches(user)]


def stored_by(marker: Node) -> list[Node]:
    """Return what a cache layer stores: keys and values, or the latents that they are computed from."""
    return [gather.x for gather in gathers(marker)]


def only_cached(marker: Node) -> bool:
    """Return whether nothing but the graph's outputs reads the layer that `marker` stands for."""
    users = [user for user in marker.users if user.op != "output" and not _follows(user)]
    readers = [user for gather in users for user in gather.users if not _follows(user)]
    return all(GatherTokensCall.matches(user) for user in users) and all(user.op == "output" for user in readers)


def followers(marker: Node) -> list[Node]:
    """Return the calls that make what a layer stores besides its gathers, in order.

    Those are the tensors of a static layer, and the other tokens of the prompt, where they are kept elsewhere.
    """
    found: set[Node] = set()
    todo = [marker, *(gather.node for gather in gathers(marker))]
    while todo:
        new = {user for user in todo.pop().users if _follows(user)} - found  # type: ignore[union-attr]
        found |= new
        todo += new
    return sorted(found)


def is_static(marker: Node) -> bool:
    """Return whether a layer that stores a prompt is a static one."""
    return any(FixedRowsCall.matches(call) for call in followers(marker))


def _follows(user: Node) -> bool:
    """Return whether a call makes what a layer stores besides its gathers; nothing but the graph's outputs reads it."""
    if FixedPositionsCall.matches(user) or RowCountCall.matches(user) or OtherTokensCall.matches(user):
        return all(map(_follows, user.users))
    if QuantiseTokensCall.matches(user):
        return all(is_call(one, operator.getitem) and _only_given(one) for one in user.users)
    parent = user.args[0] if is_call(user, operator.getitem) else None
    stored = isinstance(parent, Node) and QuantiseTokensCall.matches(parent)
    return (stored or FixedRowsCall.matches(user) or ToHostCall.matches(user)) and _only_given(user)


def _only_given(node: Node) -> bool:
    return all(one.op == "output" for one in node.users)


def filled_by(graph: Graph, attentions: list[Attention]) -> dict[Node, tuple[Attention, Node]]:
    """Return the attentions of a prefill whose K and V a layer stores, by node, each with the layer's marker."""
    markers = {call.k: call.node for call in TokenPositionsCall.all(graph)}
    found: dict[Node, tuple[Attention, Node]] = {}
    for attention in attentions:
        for form in (attention,) + (() if attention.key is attention.inputs[0] else (attention.as_read(),)):
            marker = markers.get(form.key)
            if marker is not None and form.value in stored_by(marker):
                found[attention.node] = (form, marker)
    read = {marker for _, marker in found.values()}
    stored = {marker: stored_by(marker) for marker in markers.values() if marker is not None}
    for marker, sources in stored.items():
        if marker in read or (first := computed_from(sources, attentions)) is None:
            continue
        others = {x for other, tensors in stored.items() if other is not marker for x in tensors}
        if first.node not in found and others.isdisjoint({first.key, first.value, *first.inputs}):
            found[first.node] = (first, marker)
    return {attention.node: found[attention.node] for attention in attentions if attention.node in found}


def shown_to(graph: Graph, attentions: list[Attention]) -> dict[Node, Attention]:
    """Return the attentions whose K and V are views of a compacted cache, or computed from such views, by node."""
    views = {call.node: call for call in KVViewCall.all(graph)}
    direct = [one for one in attentions if one.key in views and one.value in views]
    read = {view for one in direct for view in (one.key, one.value)}
    layers: dict[tuple, list[Node]] = {}
    for view, call in views.items():
        if view not in read and view is not None:
            layers.setdefault(call.layer, []).append(view)
    computed = [one for group in layers.values() if (one := computed_from(group, attentions)) is not None]
    return {one.node: one for one in attentions if one in direct or one in computed}


def views_above(attention: Attention) -> list[KVViewCall]:
    """Return the views of the cache that an attention's keys and values are, or are computed from."""
    if KVViewCall.matches(attention.key):
        return [KVViewCall.read(attention.key), KVViewCall.read(attention.value)]
    views, seen, todo = [], set(), [attention.key, attention.value]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if KVViewCall.matches(node):
            views.append(KVViewCall.read(node))
        else:
            written = [w for part in node.users for w in part.users if is_op(w, "copy_")]
            todo += [*node.all_input_nodes, *(x for write in written for x in write.all_input_nodes)]
    return views


def later_part_of(attention: Attention) -> Node | None:
    """Return the marker of all that is in memory of the layer that an attention reads, after a later part; or None.

    Of what there is anywhere, where the layer keeps other tokens elsewhere, too.
    """
    parts = [user for view in views_above(attention) for user in view.buffer.users if _reads_memory(user)]
    both = [user for part in parts for user in part.users if is_op(user, "cat")]
    return next(
        (marker for part in (*parts, *both) for marker in part.users if TokenPositionsCall.matches(marker)), None
    )


def _reads_memory(user: Node) -> bool:
    return is_op(user, "getitem") or RestoreTokensCall.matches(user)


def computed_from(sources: list[Node], attentions: list[Attention]) -> Attention | None:
    """Return the first attention that the sources flow into, if its keys and values are computed from them by token."""
    if not sources:
        return None
    rows = TokenRows(sources)
    first = next((one for one in attentions if not rows.reached.isdisjoint({one.query, one.key, one.value})), None)
    if first is None or rows.differs((first.key, first.value)):
        return None
    return first
