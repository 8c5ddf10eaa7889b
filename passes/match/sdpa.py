"""Attention as one call: scaled_dot_product_attention, with K and V in every form of repeated heads.

sdpa(q, k, v, enable_gqa=True)                                            k [B, Hkv, n, D]
sdpa(q, reshape(expand(k[:, :, None], g)), reshape(expand(v[:, :, None], g)))
sdpa(q, repeat_interleave(k, g, dim=1), repeat_interleave(v, g, dim=1))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.reading import arguments, changed_in_place, example, is_op, same_shape
from zipvl_compile.passes.match.attention_site import Attention

NAME = "scaled_dot_product_attention"


class Differs(Exception):
    """The graph leaves the form of an attention; the message says where."""


def read(node: Node) -> Attention:
    """Return the attention that a call of scaled_dot_product_attention is.

    Raises:
        Differs: its inputs have another form.
    """
    given = arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    shapes = [example(x) for x in (query, key, value)]
    if any(not isinstance(x, torch.Tensor) or x.dim() != 4 for x in shapes):
        raise Differs("inputs are not [batch, heads, tokens, head_dim]")
    return with_plain_heads(
        Attention(
            node=node,
            query=query,
            key=key,
            value=value,
            mask=given.get("attn_mask"),
            is_causal=bool(given.get("is_causal", False)),
            scale=given.get("scale"),
            dropout=given.get("dropout_p", 0.0),
            inputs=(key, value),
        )
    )


def with_plain_heads(site: Attention) -> Attention:
    """Return the attention with K and V before their heads were repeated."""
    key, value = (without_head_repeat(_without_slices(x)) for x in site.inputs)
    return replace(site, key=_without_slices(key), value=_without_slices(value))


def _without_slices(node: Node) -> Node:
    """Return the tensor that `node` slices where the slices, such as `k[:, :, :n]`, keep all of it."""
    while is_op(node, "getitem", "narrow", "contiguous"):
        given = arguments(node)
        source = given["input"]
        plain = isinstance(source, Node) and isinstance(example(source), torch.Tensor)
        if not plain or changed_in_place(node) or not same_shape(example(node).shape, example(source).shape):
            break
        index = given.get("index", ())
        if not all(isinstance(i, slice) or i is Ellipsis for i in (index if isinstance(index, tuple) else (index,))):
            break
        node = source
    return node


def without_head_repeat(node: Node) -> Node:
    """Return `x [B, Hkv, n, D]` where `node` repeats its heads to `[B, Hkv * g, n, D]`, else `node` itself."""
    base = _expanded_base(node) or _interleaved_base(node)
    return node if base is None or changed_in_place(node) else base


def _expanded_base(node: Node) -> Node | None:
    """Match `reshape(expand(x[:, :, None, :, :], B, H, g, n, D), B, H * g, n, D)`."""
    if not is_op(node, "reshape", "view"):
        return None
    expanded = arguments(node)["input"]
    if not is_op(expanded, "expand"):
        return None
    inserted = arguments(expanded)["input"]
    if not is_op(inserted, "getitem"):
        return None
    full = slice(None, None, None)
    if arguments(inserted)["index"] not in ((full, full, None), (full, full, None, full, full)):
        return None
    base = arguments(inserted)["input"]
    source, wide, out = example(base), example(expanded), example(node)
    same = wide.dim() == 5 and out.dim() == 4 and same_shape(wide.shape[:2] + wide.shape[3:], source.shape)
    if same and same_shape(out.shape, (source.shape[0], source.shape[1] * wide.shape[2], *source.shape[2:])):
        return base if isinstance(base, Node) else None
    return None


def _interleaved_base(node: Node) -> Node | None:
    """Match `x.repeat_interleave(g, dim=1)` with an integer `g`."""
    if not is_op(node, "repeat_interleave"):
        return None
    given = arguments(node)
    if isinstance(given.get("repeats"), int) and given.get("dim") in (1, -3):
        source = given["input"]
        return source if isinstance(source, Node) else None
    return None
