"""Floating-point operations that a call computes: two for every multiplication in a matrix product.

Attention counts the (query, key) pairs that may see each other, dense and sparse alike: what a kernel that skips hidden
pairs has to compute. `FlopCounterMode` counts every pair, hidden or not, has no formula for attention on CPUs, and
keeps Dynamo from running what it compiled; its formulas for all else are used here. Softmax, norms, and choosing and
moving tokens are no matrix products, and count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import TorchDispatchMode, flop_registry

from zipvl_compile.kernels.common.masks import causal as is_causal
from zipvl_compile.kernels.common.masks import take, visible
from zipvl_compile.kernels.ops import ops as _register  # noqa: F401
from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.kernels.token_positions import cached_positions

Arguments = Mapping[str, Any]


class CountedFlops(TorchDispatchMode):
    """Count, while entered, what models compute, compiled by an inner compiler "eager" or not compiled.

    Compile before: what Dynamo traces while it is entered would be counted too.

    Attributes:
        total: FLOPs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo run compiled code."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", None)
        name = str(getattr(packet, "_qualified_op_name", ""))
        if name not in FORMULAS and packet not in flop_registry:
            if name.startswith("zipvl::") and name not in FREE:
                raise ValueError(f"flops: expected a formula for {name}, got none. Add it to FORMULAS, or to FREE.")
            with self:
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        if name in FORMULAS:
            self.total += FORMULAS[name](_named(func, args, kwargs))
        else:
            self.total += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def _named(func: Any, args: tuple[Any, ...], kwargs: Arguments) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    declared = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in declared), args, strict=False)) | dict(kwargs)


def visible_pairs(
    rows: torch.Tensor, columns: torch.Tensor, causal: bool, mask: torch.Tensor | None, batch: int, heads: int
) -> int:
    """Return how many (query, key) pairs may see each other, over all samples and heads.

    Args:
        rows: int64 `[B or 1, m]`, where the queries stand, in the prompt and in the rows of `mask`.
        columns: int64 `[B or 1, p]`, ascending, where the keys stand.
        causal: whether later keys are hidden.
        mask: bool or additive, `[B or 1, H or 1, n or 1, n]`; None, or one of no samples, shows everything.
        batch, heads: B and H.
    """
    if mask is None or mask.shape[0] == 0:
        if not causal:
            return batch * heads * rows.shape[1] * columns.shape[1]
        rows, columns = (x.expand(batch, -1).contiguous() for x in (rows, columns))
        return heads * int(torch.searchsorted(columns, rows, right=True).sum())
    rows, columns = (x.expand(batch, -1)[:, None] for x in (rows, columns))  # [B, 1, m], [B, 1, p]
    shown = visible(take(mask, batch, rows, columns)).expand(-1, -1, rows.shape[2], -1)
    if causal:
        shown = shown & is_causal(rows, columns)
    return int(shown.sum()) * (heads // shown.shape[1])


def _flops(
    q: torch.Tensor, v: torch.Tensor | None, rows: torch.Tensor, columns: torch.Tensor, causal: bool, mask: Any
) -> int:
    """Return the FLOPs of scores and, with `v`, of weighted values; the others as in `visible_pairs`."""
    width = q.shape[3] + (0 if v is None else v.shape[3])
    return 2 * width * visible_pairs(rows, columns, causal, mask, q.shape[0], q.shape[1])


def _all_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[2], device=x.device)[None]


def _sdpa(x: Arguments) -> int:
    q, k, v, mask = x["query"], x["key"], x["value"], x.get("attn_mask", x.get("attn_bias"))
    if mask is not None:
        mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    return _flops(q, v, _all_rows(q), _all_rows(k), bool(x["is_causal"]), mask)


def _token_scores(x: Arguments) -> int:
    rows = probe_rows(x["k"].shape[2], x["recent_probes"], x["random_probes"], x["seed"])[None].to(x["k"].device)
    return _flops(x["q"], None, rows, _all_rows(x["k"]), x["is_causal"], x["mask"])


# Groups keep equally many tokens; the first one stands for all.


def _sparse_attention(x: Arguments) -> int:
    kept = x["positions"][:, 0]
    rows = _all_rows(x["q"]) if x["queries"] == "all" else kept
    return _flops(x["q"], x["v"], rows, kept, x["is_causal"], x["mask"])


def _decode_attention(x: Arguments) -> int:
    columns = cached_positions(x["positions"], x["prompt_length"], x["n"])[:, 0]
    return _flops(x["q"], x["values"], _all_rows(x["q"]), columns, False, x["mask"])


def _decode_quantised(x: Arguments) -> int:
    """Every prompt token is there; what turns codes into numbers is no matrix product."""
    columns = torch.arange(x["n"], device=x["q"].device)[None]
    return _flops(x["q"], x["values"], _all_rows(x["q"]), columns, False, x["mask"])


def _window_attention(x: Arguments) -> int:
    """Kept rows see kept keys, with `kept_window` local ones too; other rows see local ones, padding among them.

    With queries="all" every row is as a kept one, and sees all where enough are kept. The first KV head stands for all:
    they keep equally many.
    """
    kept, every = x["positions"][:, 0], x["queries"] == "all"
    columns = _all_rows(x["k"])
    whole = x["mask"] is None and x["q"].shape[2] == columns.shape[1]
    if every and whole and kept.shape[1] >= x["dense_from"] * columns.shape[1]:
        return _flops(x["q"], x["v"], columns, columns, x["is_causal"], None)
    rows = columns[:, -x["q"].shape[2] :]
    back = rows[0, :, None] - columns[0]  # [m, n], how far back a key is
    local = ((back >= 0) & ((back < x["window"]) | (columns < x["sinks"]))).expand(len(kept), -1, -1)
    is_kept = torch.zeros(len(kept), columns.shape[1], dtype=torch.bool, device=kept.device).scatter_(1, kept, True)
    sees_kept = torch.ones_like(rows, dtype=torch.bool) if every else is_kept
    only_local = local & ~(sees_kept[:, :, None] & (is_kept[:, None] | (not x["kept_window"])))
    among_kept = _flops(x["q"], x["v"], rows if every else kept, kept, x["is_causal"], x["mask"])
    return among_kept + 2 * x["q"].shape[1] * (x["q"].shape[3] + x["v"].shape[3]) * int(only_local.sum())


FORMULAS: dict[str, Callable[[Arguments], int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "aten::_scaled_dot_product_flash_attention": _sdpa,
    "aten::_scaled_dot_product_efficient_attention": _sdpa,
    "aten::_scaled_dot_product_cudnn_attention": _sdpa,
    "zipvl::token_scores": _token_scores,
    "zipvl::sparse_attention": _sparse_attention,
    "zipvl::decode_attention": _decode_attention,
    "zipvl::decode_quantised": _decode_quantised,
    "zipvl::window_attention": _window_attention,
}
#: Operators of this package without a matrix product.
FREE = frozenset(
    f"zipvl::{name}"
    for name in (
        "append_tokens", "append_tokens_torch", "fixed_positions", "fixed_rows", "gather_kv", "gather_tokens",
        "held_rows", "hiding_rows", "kv_view", "note_queries", "other_tokens", "probe_positions", "quantise_tokens",
        "restore_tokens", "room_for_queries", "row_count", "select_tokens", "to_host", "token_positions",
        "with_room",
    )
)  # fmt: skip
