"""Typed views of the operators behind the options `evict` and `reselect_every`, see `op_call`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.graph.op_call import OpCall


@dataclass(frozen=True, kw_only=True)
class ToHostCall(OpCall):
    operator = ops.to_host.default
    x: Node
    others: Node


@dataclass(frozen=True, kw_only=True)
class OtherTokensCall(OpCall):
    operator = ops.other_tokens.default
    positions: Node
    n: Any


@dataclass(frozen=True, kw_only=True)
class QuantiseTokensCall(OpCall):
    operator = ops.quantise_tokens.default
    x: Node
    positions: Node
    bits: int
    per: str


@dataclass(frozen=True, kw_only=True)
class RoomForQueriesCall(OpCall):
    operator = ops.room_for_queries.default
    x: Node
    rows: Any


@dataclass(frozen=True, kw_only=True)
class NoteQueriesCall(OpCall):
    operator = ops.note_queries.default
    queries: Node
    x: Node
    count: Any


@dataclass(frozen=True, kw_only=True)
class RestoreTokensCall(OpCall):
    operator = ops.restore_tokens.default
    kept: Node
    positions: Node
    others: Node
    scales: Node | None
    n: Any


@dataclass(frozen=True, kw_only=True)
class DecodeQuantisedCall(OpCall):
    operator = ops.decode_quantised.default
    q: Node
    keys: Node
    values: Node
    positions: Node
    prompt_length: Any
    n: Any
    key_codes: Node
    key_scales: Node
    value_codes: Node
    value_scales: Node
    mask: Node | None
    scale: Any
    softcap: float | None
    kernel_: str = "auto"
