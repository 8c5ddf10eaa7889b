"""Typed views of this package's operators in a graph: fields instead of places of arguments.

    call = TokenScoresCall.read(node)                    call.q, call.recent_probes, ...
    node = replace(call, q=few).insert(before)           another call, with its fake value
    replace(call, q=few).write()                         the same node with other arguments

The fields have the names of the operators' schemas, in their order.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.graph.graph import insert_call
from zipvl_compile.passes.graph.op_call import OpCall
from zipvl_compile.passes.graph.private import OpOverload


@dataclass(frozen=True, kw_only=True)
class TokenPositionsCall(OpCall):
    operator = ops.token_positions.default
    k: Node


@dataclass(frozen=True, kw_only=True)
class ProbePositionsCall(OpCall):
    operator = ops.probe_positions.default
    k: Node
    recent_probes: int
    random_probes: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class TokenScoresCall(OpCall):
    operator = ops.token_scores.default
    q: Node
    k: Node
    mask: Node | None
    is_causal: bool
    scale: float | Node | None
    softcap: float | None
    recent_probes: int
    random_probes: int
    seed: int
    groups: int
    even: bool = False
    kernel_: str = "auto"


@dataclass(frozen=True, kw_only=True)
class SelectTokensCall(OpCall):
    operator = ops.select_tokens.default
    accumulated: Node
    visible: Node
    tau: float
    keep_ratio: float | None
    keep_recent: Any
    protected: Node | None = None
    keep_tokens: int | None = None
    floor: float = 0.0
    keep_first: int = 0
    ranking: Node | None = None
    budget: Node | None = None
    kernel_: str = "auto"

    @property
    def scores(self) -> TokenScoresCall:
        """Return the call whose scores are selected from."""
        return TokenScoresCall.read(self.visible.args[0])  # the scores themselves may be a sum over ranks


@dataclass(frozen=True, kw_only=True)
class GatherTokensCall(OpCall):
    operator = ops.gather_tokens.default
    x: Node
    positions: Node
    spare: Any
    kernel_: str = "auto"


@dataclass(frozen=True, kw_only=True)
class GatherKVCall(OpCall):
    operator = ops.gather_kv.default
    k: Node
    v: Node
    positions: Node
    spare: Any
    kernel_: str = "auto"


@dataclass(frozen=True, kw_only=True)
class WithRoomCall(OpCall):
    operator = ops.with_room.default
    x: Node
    spare: Any


@dataclass(frozen=True, kw_only=True)
class FixedRowsCall(OpCall):
    operator = ops.fixed_rows.default
    x: Node


@dataclass(frozen=True, kw_only=True)
class FixedPositionsCall(OpCall):
    operator = ops.fixed_positions.default
    positions: Node
    prompt_length: Any
    room: Any


@dataclass(frozen=True, kw_only=True)
class RowCountCall(OpCall):
    operator = ops.row_count.default
    positions: Node


@dataclass(frozen=True, kw_only=True)
class HidingRowsCall(OpCall):
    operator = ops.hiding_rows.default
    mask: Node


@dataclass(frozen=True, kw_only=True)
class HeldRowsCall(OpCall):
    operator = ops.held_rows.default
    positions: Node
    n: Any


@dataclass(frozen=True, kw_only=True)
class KVViewCall(OpCall):
    operator = ops.kv_view.default
    buffer: Node
    positions: Node
    prompt_length: Any
    n: Any
    held: Node | None = None
    codes: Node | None = None
    scales: Node | None = None

    @property
    def layer(self) -> tuple[Any, ...]:
        """Return what the views of one cache layer share."""
        return (self.positions, self.prompt_length, self.n)


@dataclass(frozen=True, kw_only=True)
class SparseAttentionCall(OpCall):
    operator = ops.sparse_attention.default
    q: Node
    k: Node
    v: Node
    positions: Node
    mask: Node | None
    is_causal: bool
    scale: float | Node | None
    softcap: float | None
    queries: str
    kernel_: str = "auto"


@dataclass(frozen=True, kw_only=True)
class WindowAttentionCall(OpCall):
    operator = ops.window_attention.default
    q: Node
    k: Node
    v: Node
    kept_k: Node
    kept_v: Node
    positions: Node
    visible: Node
    mask: Node | None
    is_causal: bool
    scale: float | Node | None
    softcap: float | None
    window: int
    sinks: int
    kept_window: bool
    queries: str
    dense_from: float = 1.0
    kernel_: str = "auto"


@dataclass(frozen=True, kw_only=True)
class DecodeAttentionCall(OpCall):
    operator = ops.decode_attention.default
    q: Node
    keys: Node
    values: Node
    positions: Node
    prompt_length: Any
    n: Any
    mask: Node | None
    scale: float | Node | None
    softcap: float | None
    held: Node | None = None
    kernel_: str = "auto"


def has_kernels(node: Node) -> bool:
    """Return whether a node calls an operator of this package that has several implementations."""
    target = node.target  # Dynamo records the packet of overloads, the passes insert the overload
    overload = getattr(target, "default", target) if node.op == "call_function" else None
    if not isinstance(overload, OpOverload) or overload.namespace != "zipvl":
        return False
    return any(argument.name == "kernel_" for argument in overload._schema.arguments)


def outputs(call: Node, before: Node, count: int = 2) -> list[Node]:
    """Insert the reading of a call's results, one by one."""
    return [insert_call(before, operator.getitem, (call, i)) for i in range(count)]
