"""Attention sites: every scaled-dot-product attention of a graph, in one canonical form.

Dynamo graphs hold the call in two GQA forms, which `find` reads as one:

    sdpa(q, k, v, enable_gqa=True)                                            k [B, Hkv, n, D]
    sdpa(q, reshape(expand(k[:, :, None], g)), reshape(expand(v[:, :, None], g)))
    sdpa(q, repeat_interleave(k, g, dim=1), repeat_interleave(v, g, dim=1))
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph_edit import calls, example

SDPA = F.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class AttentionSite:
    """One attention: its node and its inputs, heads not repeated.

    `query [B, Hq, m, D]`, `key [B, Hkv, n, D]`, `value [B, Hkv, n, Dv]`; `mask` is None or
    `[B or 1, Hq or 1, m, n]`; `scale` None is `D ** -0.5`. `inputs` are K and V as the call reads them, which differ
    from `key` and `value` where their heads are repeated.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float | None
    dropout: float
    inputs: tuple[Node, Node]

    def as_read(self) -> AttentionSite:
        """Return the site with K and V as the call reads them, heads repeated: for caches that hold them so."""
        return replace(self, key=self.inputs[0], value=self.inputs[1])

    @property
    def name(self) -> str:
        """Return the path of the module that holds the attention, or the node's name where Dynamo lost it."""
        return module_path(self.node)


def module_path(node: Node) -> str:
    """Return the innermost module path of `node`, such as `language_model.layers.0.self_attn`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return f"({node.name})"
    path = next(reversed(stack.values()))[0]
    # A frame after a graph break starts at an inner module: `model.` comes and goes.
    for prefix in ("L['self'].", "L['self']", "L['fn'].", "L['fn']", "model."):
        path = path.removeprefix(prefix)
    return path.replace("._modules", "").replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")


def find(graph: Graph) -> list[AttentionSite]:
    """Return the attention sites of `graph`, in execution order."""
    return [site for node in calls(graph, SDPA) if (site := _read(node)) is not None]


def _read(node: Node) -> AttentionSite | None:
    given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    shapes = [example(x) for x in (query, key, value)]
    if any(not isinstance(x, torch.Tensor) or x.dim() != 4 for x in shapes):
        return None
    return AttentionSite(
        node=node,
        query=query,
        key=without_head_repeat(key),
        value=without_head_repeat(value),
        mask=given.get("attn_mask"),
        is_causal=bool(given.get("is_causal", False)),
        scale=given.get("scale"),
        dropout=given.get("dropout_p", 0.0),
        inputs=(key, value),
    )


def without_head_repeat(node: Node) -> Node:
    """Return `x [B, Hkv, n, D]` where `node` repeats its heads to `[B, Hkv * g, n, D]`, else `node` itself."""
    base = _expanded_base(node) or _interleaved_base(node)
    return node if base is None or changed_in_place(node) else base


def _expanded_base(node: Node) -> Node | None:
    """Match `reshape(expand(x[:, :, None, :, :], B, H, g, n, D), B, H * g, n, D)`."""
    if not (node.op == "call_method" and node.target in ("reshape", "view")):
        return None
    expanded = node.args[0]
    if not (isinstance(expanded, Node) and expanded.op == "call_method" and expanded.target == "expand"):
        return None
    inserted = expanded.args[0]
    if not (isinstance(inserted, Node) and inserted.target is operator.getitem):
        return None
    full = slice(None, None, None)
    index = inserted.args[1]
    if index not in ((full, full, None), (full, full, None, full, full)):
        return None
    base = inserted.args[0]
    source, wide, out = example(base), example(expanded), example(node)
    same = wide.dim() == 5 and out.dim() == 4 and _same(wide.shape[:2] + wide.shape[3:], source.shape)
    if same and _same(out.shape, (source.shape[0], source.shape[1] * wide.shape[2], *source.shape[2:])):
        return base if isinstance(base, Node) else None
    return None


def _interleaved_base(node: Node) -> Node | None:
    """Match `x.repeat_interleave(g, dim=1)` with an integer `g`."""
    is_method = node.op == "call_method" and node.target == "repeat_interleave"
    if not (is_method or node.target is torch.repeat_interleave):
        return None
    given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
    if isinstance(given.get("repeats"), int) and given.get("dim") in (1, -3):
        source = given["input"]
        return source if isinstance(source, Node) else None
    return None


def _same(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def changed_in_place(node: Node) -> bool:
    """Return whether the graph writes into the tensor of `node`, directly or through a view of it."""
    return any(
        _writes(user) or (_is_view(user) and changed_in_place(user))
        for user in node.users
        if user.args and user.args[0] is node
    )


def _writes(user: Node) -> bool:
    if isinstance(user.target, torch._ops.OpOverload):
        return user.target._schema.is_mutable
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("setitem", "__setitem__") or user.target in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior)
_VIEWS = ("getitem", "expand", "reshape", "view", "transpose", "permute", "unsqueeze", "squeeze", "narrow", "flatten")


def _is_view(user: Node) -> bool:
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    return name in _VIEWS


def mask_fits(site: AttentionSite) -> bool:
    """Return whether the mask is a `[B or 1, Hq or 1, m, n]` tensor, the form that the operators read."""
    if site.mask is None:
        return True
    mask, q, k = example(site.mask), example(site.query), example(site.key)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return False
    leading = all(
        statically_known_true(mask.shape[i] == 1) or statically_known_true(mask.shape[i] == q.shape[i]) for i in (0, 1)
    )
    return leading and _same(mask.shape[2:], (q.shape[2], k.shape[2]))
