"""Every attention of a graph in one canonical form.

    sdpa(q, k, v, enable_gqa=True)                                            k [B, Hkv, n, D]
    sdpa(q, reshape(expand(k[:, :, None], g)), reshape(expand(v[:, :, None], g)))
    sdpa(q, repeat_interleave(k, g, dim=1), repeat_interleave(v, g, dim=1))
    matmul(softmax(matmul(q, k.T) * scale + mask), v)                         see eager_attention.py

`find` gives the sites; `near_misses` gives what resembles an attention and is none, each with the nearest pattern and
the first difference from it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from zipvl_compile.passes.graph.graph import args_of, arguments, example, is_call, op_name
from zipvl_compile.passes.match import eager as eager_attention
from zipvl_compile.passes.match.attention_site import AttentionSite, changed_in_place, same_shape

SDPA = F.scaled_dot_product_attention
FLEX = torch.ops.higher_order.flex_attention
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class NearMiss:
    """A node that a pattern nearly matches.

    Attributes:
        node: where the pattern starts: the SDPA or FlexAttention call, or the softmax.
        pattern: name of the nearest pattern.
        difference: the first difference from it.
    """

    node: Node
    pattern: str
    difference: str

    def __str__(self) -> str:
        return f"nearest pattern: {self.pattern}; first difference: {self.difference}"


def find(graph: Graph) -> list[AttentionSite]:
    """Return the attention sites of `graph`, in execution order."""
    return [found for found in _read_all(graph) if isinstance(found, AttentionSite)]


def near_misses(graph: Graph) -> list[NearMiss]:
    """Return what no pattern matches though it resembles one, in execution order."""
    return [found for found in _read_all(graph) if isinstance(found, NearMiss)]


def _read_all(graph: Graph) -> list[AttentionSite | NearMiss]:
    found: list[AttentionSite | NearMiss] = []
    for node in graph.nodes:
        if is_call(node, SDPA):
            found.append(_read_sdpa(node))
        elif node.op == "call_function" and node.target is FLEX:
            found.append(NearMiss(node, "FlexAttention", _FLEX_IS_CODE))
        elif eager_attention.is_softmax(node):
            found.append(_read_eager(node))
    return found


_FLEX_IS_CODE = "its mask and scores are functions (mask_mod, score_mod), not tensors"


def _read_sdpa(node: Node) -> AttentionSite | NearMiss:
    given: dict[str, Any] = arguments(node, *SDPA_ARGUMENTS)
    query, key, value = given["query"], given["key"], given["value"]
    shapes = [example(x) for x in (query, key, value)]
    if any(not isinstance(x, torch.Tensor) or x.dim() != 4 for x in shapes):
        return NearMiss(node, "scaled_dot_product_attention", "inputs are not [batch, heads, tokens, head_dim]")
    return _with_plain_heads(
        AttentionSite(
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


def _read_eager(softmax: Node) -> AttentionSite | NearMiss:
    try:
        return _with_plain_heads(eager_attention.read(softmax))
    except eager_attention.Differs as difference:
        return NearMiss(softmax, eager_attention.NAME, str(difference))


def _with_plain_heads(site: AttentionSite) -> AttentionSite:
    key, value = (without_head_repeat(_without_slices(x)) for x in site.inputs)
    return replace(site, key=_without_slices(key), value=_without_slices(value))


def _without_slices(node: Node) -> Node:
    """Return the tensor that `node` slices where the slices, such as `k[:, :, :n]`, keep all of it."""
    while node.op != "placeholder" and op_name(node) in ("getitem", "narrow", "contiguous"):
        source = args_of(node)[0]
        plain = isinstance(source, Node) and isinstance(example(source), torch.Tensor)
        if not plain or changed_in_place(node) or not same_shape(example(node).shape, example(source).shape):
            break
        index = args_of(node)[1] if op_name(node) == "getitem" else ()
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
    if not (node.op == "call_method" and node.target in ("reshape", "view")):
        return None
    expanded = args_of(node)[0]
    if not (isinstance(expanded, Node) and expanded.op == "call_method" and expanded.target == "expand"):
        return None
    inserted = args_of(expanded)[0]
    if not (isinstance(inserted, Node) and inserted.target is operator.getitem):
        return None
    full = slice(None, None, None)
    index = args_of(inserted)[1]
    if index not in ((full, full, None), (full, full, None, full, full)):
        return None
    base = args_of(inserted)[0]
    source, wide, out = example(base), example(expanded), example(node)
    same = wide.dim() == 5 and out.dim() == 4 and same_shape(wide.shape[:2] + wide.shape[3:], source.shape)
    if same and same_shape(out.shape, (source.shape[0], source.shape[1] * wide.shape[2], *source.shape[2:])):
        return base if isinstance(base, Node) else None
    return None


def _interleaved_base(node: Node) -> Node | None:
    """Match `x.repeat_interleave(g, dim=1)` with an integer `g`."""
    is_method = node.op == "call_method" and node.target == "repeat_interleave"
    if not (is_method or node.target is torch.repeat_interleave):
        return None
    given = arguments(node, "input", "repeats", "dim")
    if isinstance(given.get("repeats"), int) and given.get("dim") in (1, -3):
        source = given["input"]
        return source if isinstance(source, Node) else None
    return None
