"""One canonical form of every attention, however the model wrote it; `sdpa.py` and `eager.py` make them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from zipvl_compile.passes.graph.graph import current, erase_orphans, erase_unread, insert_call
from zipvl_compile.passes.graph.graph import replace as replace_node
from zipvl_compile.passes.graph.reading import example

#: So many queries at once are a part of a prompt, and not draft tokens to verify.
PART_TOKENS = 128


@dataclass(frozen=True)
class Attention:
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

    def as_read(self) -> Attention:
        """Return the attention with K and V as the call reads them, heads repeated: for caches that hold them so."""
        return replace(self, key=self.inputs[0], value=self.inputs[1])

    def as_it_stands(self) -> Attention:
        """Return the attention with what stands for its inputs after the replacements that passes made."""

        def new(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(new, value))
            return current(value) if isinstance(value, Node) else value

        return replace(self, **{one.name: new(getattr(self, one.name)) for one in fields(self)})

    @property
    def name(self) -> str:
        """Return the path of the module that holds the attention, or the node's name where Dynamo lost it."""
        return module_path(self.node)

    @property
    def reads_whole_prompt(self) -> bool:
        """Return whether there are as many queries as keys."""
        return statically_known_true(example(self.query).shape[2] == example(self.key).shape[2])

    @property
    def is_later_part(self) -> bool:
        """Return whether so many queries come at once that they are a part of a prompt, not tokens to verify.

        For an attention that reads a cache. Where their number is a symbol, this becomes a guard.
        """
        return bool(example(self.query).shape[2] >= PART_TOKENS)

    def in_its_dtype(self, x: Node) -> Node:
        """Return an input in the dtype that the attention computes in, which under autocast is not its own."""
        dtype = example(self.node).dtype
        return x if example(x).dtype == dtype else insert_call(self.node, torch.ops.aten.to.dtype, (x, dtype))

    def replace_with(self, out: Node) -> Node:
        """Put `out [B, Hq, m, Dv]` in the place of the attention and erase what only the attention used.

        Returns:
            `out`, or what it takes to have its shape.
        """
        whole = insert_call(self.node, torch.flatten, (out, 0, 1)) if self.merged else out
        replace_node(self.node, whole)
        erase_unread([self.node, *self.interior])
        erase_orphans(self.inputs)
        return whole


@dataclass(frozen=True)
class AttentionShape:
    """What the cost of one attention depends on besides the prompt length.

    Attributes:
        batch: samples.
        query_heads, kv_heads: attention heads.
        head_dim, value_dim: elements of a head of Q and K, and of V.
        probes: probe rows (tokens).
        element: bytes of one element.
        every_query: every query attends to the kept keys, not only the kept ones.
        dense_mask, sparse_mask: dense, or sparse, attention reads a mask from memory.
        local: keys that every query sees besides the kept ones (tokens).
        work: what a token saves that passes the layer (multiply-adds); 0 where none does.
        dense_from: fraction of kept tokens from which it attends to every token instead.
        shared: other ranks have others of its heads.
    """

    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    probes: int
    element: int
    every_query: bool = False
    dense_mask: bool = False
    sparse_mask: bool = False
    local: int = 0
    work: int = 0
    dense_from: float = math.inf
    shared: bool = False


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


def mask_fits(site: Attention) -> bool:
    """Return whether the mask broadcasts to `[B, Hq, m, n]` over batch, heads and queries, as the operators read it."""
    if site.mask is None:
        return True
    mask, q, k = example(site.mask), example(site.query), example(site.key)
    if not isinstance(mask, torch.Tensor) or not 2 <= mask.dim() <= 4:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    sizes: tuple[Any, ...] = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])[-mask.dim() :]
    leading = zip(mask.shape[:-1], sizes[:-1], strict=True)
    fits = all(statically_known_true(have == 1) or guard_or_false(have == want) for have, want in leading)
    # Layers count what they hold by themselves: that those numbers are one is seldom known, and becomes a guard.
    return fits and guard_or_false(mask.shape[-1] == sizes[-1])
