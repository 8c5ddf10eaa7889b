"""Why no pass considers an attention, and the KV caches that no attention reads.

A report lists every attention of the graph: a decoder that stays dense is never silent, and a vision tower that should
stay dense says so. Only a hand-written attention of an unknown form that reads no cache goes unlisted: nothing tells it
from any other softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.op_calls import GatherTokensCall, KVViewCall, TokenPositionsCall
from zipvl_compile.passes.graph.reading import arguments, example, is_op, of, shared, spelled, written
from zipvl_compile.passes.masks import mask_form
from zipvl_compile.passes.match import cache_layers
from zipvl_compile.passes.match.attention_site import Attention, module_path
from zipvl_compile.passes.match.cross_attention import is_cross_attention
from zipvl_compile.passes.match.near_miss import NearMiss
from zipvl_compile.passes.match.outcome import Kind, SiteOutcome
from zipvl_compile.passes.match.reasons import CROSS_ATTENTION, LATER_PART_ELSEWHERE, Reason, Why, fault
from zipvl_compile.passes.tokenwise.backward_slice import TokenRows

NO_CACHE = Reason(Why.NO_CACHE, "no KV cache: the call has use_cache=False, or needs gradients")
VISION = Reason(Why.ENCODER, "no KV cache: a vision tower or an encoder")
UNCACHED = Reason(Why.NO_CACHE, "no KV cache: a vision tower, an encoder, or a call with use_cache=False")
CROSS_OR_CHUNKS = Reason(Why.ENCODER, "no KV cache: cross-attention, or an encoder that attends in chunks")
WINDOW = Reason(Why.SLIDING_WINDOW, "sliding window or chunks: the cache holds one window only")
NOT_CACHED = Reason(Why.NOT_CACHED, "keys and values are not cached by the same layer")
OTHER_GRAPH = Reason(
    Why.OTHER_GRAPH,
    "its keys come from outside of this graph: a graph break lies before the attention, or a cache that is not traced "
    "hands them over, such as a quantized one or the paged one of continuous batching (generate_batch)",
)
OTHER_LAYER = Reason(Why.OTHER_LAYER, "no KV cache of its own: it reads that of a layer that stays dense")
FULL_CACHE = Reason(Why.FULL_CACHE, "the KV cache holds every token: decoding is as without zipvl")
STATIC_CACHE = Reason(
    Why.STATIC_CACHE,
    "static KV cache of full length, made before zipvl read a prompt: leave prefill_chunk_size out, or "
    "cache_implementation='static', and run the prompt through the compiled model",
)
FOREIGN_CACHE = Reason(
    Why.FOREIGN_CACHE,
    "KV cache without zipvl layers: it is a quantized one, the model has cache layers of its own, or it was made "
    "without DynamicCache(config=model.config)",
)
OTHER_CACHE = Reason(
    Why.OTHER_CACHE, "the KV cache holds something else than keys and values: latents, an index or a state"
)
SDPA_HELPS = "call model.set_attn_implementation('sdpa')"
BROKEN = Reason(Why.OTHER_GRAPH, "a graph break lies between the cache update and the attention")


def classify_all(attentions: list[Attention]) -> list[tuple[Kind, Reason]]:
    """Return kind and reason of attentions that no pass considers.

    A causal attention without a cache, beside others that have one, is no uncached call.
    """
    found = [_guarded(attention) for attention in attentions]
    cached = [_queries(one) for one, (kind, _) in zip(attentions, found, strict=True) if kind != "other"]
    return [
        ("prefill", OTHER_LAYER)
        if reason is NO_CACHE and any(statically_known_true(_queries(one) == n) for n in cached)
        else (kind, reason)
        for one, (kind, reason) in zip(attentions, found, strict=True)
    ]


def _queries(attention: Attention) -> Any:
    return example(attention.query).shape[2]


def _guarded(attention: Attention) -> tuple[Kind, Reason]:
    try:
        return classify(attention)
    except Exception as error:  # a fault of ours must not break the user's compile
        return "other", fault(error)


def classify(attention: Attention) -> tuple[Kind, Reason]:
    """Return why no pass considers an attention, and what kind it is."""
    same_length = attention.reads_whole_prompt
    cached: Kind = "prefill" if same_length else "decode"
    key = attention.key
    if KVViewCall.matches(key) or any(TokenPositionsCall.matches(user) for user in key.users):
        return cached, NOT_CACHED
    windows = [user for user in key.users if _is_window(user)]
    if windows and (_grows(key) or any(is_op(user, "copy_") for window in windows for user in window.users)):
        return cached, WINDOW
    if _is_written(key):  # as many keys as there is room, whatever the prompt has
        return "decode" if statically_known_true(_queries(attention) == 1) else "prefill", STATIC_CACHE
    if _grows(key):
        if not _extends_input(key):
            return cached, FOREIGN_CACHE
        return cached, LATER_PART_ELSEWHERE if attention.is_later_part else FULL_CACHE
    mask = attention.mask
    form = mask_form.MaskForm(()) if mask is None else mask_form.read(mask, attention.mask_hides)
    is_causal = attention.is_causal or form.is_causal
    if is_cross_attention(attention) and not is_causal:
        return "other", CROSS_ATTENTION
    if _has_cache(attention):
        return cached, OTHER_CACHE
    if key.op == "placeholder" and (is_causal or mask_form.UNKNOWN in form.parts):
        return cached, OTHER_GRAPH
    if is_causal or mask_form.PACKED in form.parts:
        return "other", NO_CACHE
    if mask_form.UNKNOWN in form.parts:
        return "other", UNCACHED
    return "other", VISION if same_length else CROSS_OR_CHUNKS


def _has_cache(attention: Attention) -> bool:
    """Return whether the attention's own module extends a tensor along the token axis, above its keys."""
    seen, todo, name = set(), [attention.key], attention.name
    while todo:
        node = todo.pop()
        if node in seen or not module_path(node).startswith(name) or node.op == "placeholder":
            continue
        seen.add(node)
        if _grows(node):
            return True
        todo.extend(node.all_input_nodes)
    return False


Unread = list[tuple[SiteOutcome, Attention | NearMiss | None]]


def unread_layers(
    graph: Graph, attentions: list[Attention], misses: list[NearMiss], claimed: Collection[Node | None]
) -> Unread:
    """Name the cache layers that no attention reads, each with the attention that comes nearest.

    Args:
        claimed: markers of the layers that an attention is known to fill or to read.
    """
    read = {x for one in attentions for x in (*one.inputs, one.key, one.value)}
    attended: dict[Node, Attention | NearMiss] = {one.node: one for one in attentions}
    attended |= {miss.node: miss for miss in misses}
    outcomes: Unread = []
    layers = set()  # a layer has a view of its keys and one of its values
    for kind, call in _MARKERS.items():
        for node in (one.node for one in call.all(graph)):  # type: ignore[attr-defined]
            source, layer = _source(node), node.args[1:] or node
            if layer in layers or source in read or node in claimed:
                continue
            layers.add(layer)
            nearest = attended.get(_first_reader(source, set(attended)))  # type: ignore[arg-type]
            outcomes.append((SiteOutcome(module_path(node), kind, _unread(node, source, nearest)), nearest))
    return outcomes


def _first_reader(source: Node, attentions: set[Node]) -> Node | None:
    """Return the first of `attentions` that the cached tensor flows into."""
    reached, node = {source}, source.next
    while node.op != "output":
        if not reached.isdisjoint(node.all_input_nodes):
            if node in attentions:
                return node
            reached.add(node)
        node = node.next
    return None


def _unread(marker: Node, source: Node, nearest: Attention | NearMiss | None) -> Reason:
    """Return why nothing recognisable attends to `source`."""
    if all(
        user.op == "output" or TokenPositionsCall.matches(user) or GatherTokensCall.matches(user)
        for user in source.users
    ):
        return BROKEN
    if isinstance(nearest, Attention):
        difference = TokenRows(_stored(marker)).differs((nearest.key, nearest.value))
        return Reason(Why.LATENT_CACHE, f"latent KV cache: {difference or 'keys and values are not cached alike'}")
    if nearest is None:
        kernel = _first_kernel(source)
        found = "no attention over the cached keys" if kernel is None else f"the cached keys are read by {kernel}"
        return Reason(Why.NOT_RECOGNISED, f"{found}: {SDPA_HELPS}")
    return Reason(Why.NOT_RECOGNISED, f"not recognised as attention ({nearest}): {SDPA_HELPS}")


def _first_kernel(source: Node) -> str | None:
    """Return what the cached tensor flows into first that is no operation of PyTorch, such as `flash_attn::fwd`."""
    reached, node = {source}, source.next
    while node.op != "output":
        if not reached.isdisjoint(node.all_input_nodes):
            operation = of(node)
            name = spelled(node) if operation is None else operation.name
            if operation is None or ("::" in name and not name.startswith(("aten::", "zipvl::"))):
                return name
            reached.add(node)
        node = node.next
    return None


def read_alone(miss: NearMiss) -> tuple[Kind, Reason]:
    """Return kind and reason of what resembles attention where no marker of a cache layer leads to it."""
    key = miss.node.args[1] if miss.is_flex else None
    if isinstance(key, Node) and _grows(key) and _extends_input(key):
        return "decode", FULL_CACHE
    return "other", miss.reason


def _stored(marker: Node) -> list[Node]:
    """Return everything that the layer of a marker stores: keys and values, or latents."""
    if KVViewCall.matches(marker):
        layer = KVViewCall.read(marker).layer
        return [call.node for call in KVViewCall.all(marker.graph) if call.layer == layer]  # type: ignore[misc]
    return cache_layers.stored_by(marker)


_MARKERS: dict[Kind, Callable] = {"prefill": TokenPositionsCall, "decode": KVViewCall}


def _source(marker: Node) -> Node:
    """Return the node that attention reads as the keys (or values) of a cache layer."""
    return marker if KVViewCall.matches(marker) else TokenPositionsCall.read(marker).k


def _is_window(node: Node) -> bool:
    """Return whether `node` is the slice `x[:, :, -w:]` that a sliding-window layer caches."""
    index = arguments(node)["index"] if is_op(node, "getitem") else None
    if not (isinstance(index, tuple) and len(index) > 2):
        return False
    tokens = index[2]
    return isinstance(tokens, slice) and isinstance(tokens.start, int) and tokens.start < 0


def _grows(node: Node) -> bool:
    """Return whether `node` concatenates keys along the token axis, as caches do."""
    return is_op(node, "cat") and arguments(node).get("dim", 0) in (2, -2) and example(node).dim() == 4


def _extends_input(node: Node) -> bool:
    """Return whether a concatenation appends to one tensor that comes into the graph, and goes out as what is cached.

    So does a cache that holds every token; one that holds a window, or that is only looked at, stores something else.
    """
    parts = arguments(node)["tensors"]
    appends = isinstance(parts, (list, tuple)) and len(parts) == 2 and parts[0].op == "placeholder"
    return appends and any(user.op == "output" for user in node.users)


def _is_written(key: Node) -> bool:
    """Return whether the graph writes tokens into the memory of a key, as static caches do."""
    memory: set[Node] = set()
    todo = [key]
    while todo:
        node = todo.pop()
        if node not in memory and example(node).dim() == 4:
            memory.add(node)
            todo += [x for x in shared(node) if isinstance(example(x), torch.Tensor)]
    return any(node in written(user) and _writes_tokens(user, node) for node in memory for user in node.users)


def _writes_tokens(write: Node, buffer: Node) -> bool:
    """Return whether a call writes along the token axis of a buffer, or all of one that comes into the graph."""
    if is_op(write, "index_copy_"):
        return arguments(write)["dim"] in (2, -2)
    if is_op(write, "setitem"):
        index = arguments(write)["index"]
        whole = isinstance(index, tuple) and (len(index) < 3 or Ellipsis in index or index[2] == slice(None))
        return isinstance(index, tuple) and not whole
    return is_op(write, "copy_") and buffer.op == "placeholder"
