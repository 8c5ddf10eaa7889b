"""Attention sites: one canonical form of every attention, however the model wrote it.

`normalize_attention.find` makes them; the passes read and replace them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import erase_orphans, erase_unread, example, insert_call


@dataclass(frozen=True)
class AttentionSite:
    """One attention: the node that gives its output, and its inputs, heads not repeated.

    `query [B, Hq, m, D]`, `key [B, Hkv, n, D]`, `value [B, Hkv, n, Dv]`. `inputs` are K and V as the attention reads
    them, which differ from `key` and `value` where their heads are repeated.

    Attributes:
        mask: None, or bool or additive float, `[B or 1, Hq or 1, m or 1, n]` or fewer leading axes.
        mask_hides: a True of the mask hides its key, as in `masked_fill`.
        scale: of the scores, a number or a node that gives one; None is `D ** -0.5`.
        softcap: c of `c * tanh(scores / c)`.
        interior: nodes that only this attention uses, from the output upwards; empty for a single call.
        merged: batch and heads are one axis of the output, `[B * Hq, m, Dv]`.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float | Node | None
    dropout: float
    inputs: tuple[Node, Node]
    mask_hides: bool = False
    softcap: float | None = None
    interior: tuple[Node, ...] = ()
    merged: bool = False

    def as_read(self) -> AttentionSite:
        """Return the site with K and V as the call reads them, heads repeated: for caches that hold them so."""
        return replace(self, key=self.inputs[0], value=self.inputs[1])

    @property
    def name(self) -> str:
        """Return the path of the module that holds the attention, or the node's name where Dynamo lost it."""
        return module_path(self.node)

    def replace_with(self, out: Node) -> None:
        """Put `out [B, Hq, m, Dv]` in the place of the attention and erase what only the attention used."""
        if self.merged:
            out = insert_call(self.node, torch.flatten, (out, 0, 1))
        self.node.replace_all_uses_with(out)
        erase_unread([self.node, *self.interior])
        erase_orphans(self.inputs)


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


def same_shape(left: Any, right: Any) -> bool:
    """Return whether two shapes are known to be equal."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def changed_in_place(node: Node) -> bool:
    """Return whether the graph writes into the tensor of `node`, directly or through a view of it."""
    return any(
        writes(user) or (_is_view(user) and changed_in_place(user))
        for user in node.users
        if user.args and user.args[0] is node
    )


def writes(user: Node) -> bool:
    """Return whether a call changes its first argument."""
    if isinstance(user.target, torch._ops.OpOverload):
        return user.target._schema.is_mutable
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and user.target not in _NAMED_LIKE_WRITES
    return in_place or name in ("setitem", "__setitem__") or user.target in _IN_PLACE_OPERATORS


_NAMED_LIKE_WRITES = (operator.and_, operator.or_, operator.not_)
_IN_PLACE_OPERATORS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
)  # fmt: skip
_VIEWS = ("getitem", "expand", "reshape", "view", "transpose", "permute", "unsqueeze", "squeeze", "narrow", "flatten")


def _is_view(user: Node) -> bool:
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    return name in _VIEWS


def mask_fits(site: AttentionSite) -> bool:
    """Return whether the mask broadcasts to `[B, Hq, m, n]` over batch, heads and queries, as the operators read it."""
    if site.mask is None:
        return True
    mask, q, k = example(site.mask), example(site.query), example(site.key)
    if not isinstance(mask, torch.Tensor) or not 2 <= mask.dim() <= 4:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])[-mask.dim() :]
    leading = zip(mask.shape[:-1], sizes[:-1], strict=True)
    fits = all(statically_known_true(have == 1) or statically_known_true(have == want) for have, want in leading)
    return fits and statically_known_true(mask.shape[-1] == sizes[-1])
