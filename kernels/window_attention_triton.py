"""window_attention in Triton: blocks of rows over a band of keys and the sinks; kept rows over the kept keys besides.

With queries="all" every row is treated as a kept one: it sees as many kept keys as stand at its position or before.
A kept row carries the state of one softmax from the kept keys on to the local ones, where kept keys are hidden. Blocks
of kept rows read the band from the first row's window to the last row, so all bands together are as long as the prompt.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common import tiles
from zipvl_compile.kernels.common.checks import per_head
from zipvl_compile.kernels.common.dispatch import launchable
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.common.tiles import absorb, capped, dot, masked
from zipvl_compile.kernels.sparse_attention import _attend_columns, sparse_attention, tilings
from zipvl_compile.kernels.sparse_attention_torch import empty_output
from zipvl_compile.kernels.window_attention_torch import kept_tokens

SINKS = 16  # of a tile, as few as tl.dot takes


@triton.jit
def _attend_local(
    state, tile, k, v, is_kept, mask, at, column, exists, window, scale, softcap, hidden_below,
    stride_kn, stride_vn, stride_mq, stride_mk, D, DV,
    FAR: tl.constexpr, KEPT: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr, ROW: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Take the keys at `column [N]` into the softmax of the rows at `at [M]`: those in the window, or those before."""
    top, total, result = state
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    wide = column.to(tl.int64)
    keys = tl.load(k + wide[None, :] * stride_kn + d[:, None], mask=exists[None, :] & (d < D)[:, None], other=0.0)
    scores = capped(dot(tile, keys), scale, softcap, CAPPED)  # [M, N]
    i, j = at.to(tl.int32)[:, None], column.to(tl.int32)[None, :]
    shown = j <= i - window if FAR else (j <= i) & (j > i - window)
    shown = shown & exists[None, :]
    if KEPT:  # the rows have seen the kept keys already
        shown = shown & (tl.load(is_kept + wide, mask=exists, other=1) == 0)[None, :]
    pointers = mask + wide * stride_mk if ROW else mask + at[:, None] * stride_mq + wide[None, :] * stride_mk
    scores = masked(scores, shown, exists, pointers, hidden_below, MASK, ROW)
    values = tl.load(v + wide[:, None] * stride_vn + dv[None, :], mask=exists[:, None] & (dv < DV)[None, :], other=0.0)
    return absorb(top, total, result, scores, values)


@triton.jit
def _window_attention_kernel(
    q, k, v, out, is_kept, upto, sinks, mask, kept_k, kept_v, positions, kept_mask,
    n, M, P, S, window, scale, softcap, hidden_below,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_wb, stride_wh, stride_wk, D, DV,
    HEADS: tl.constexpr, FACTOR: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, EVERY: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of the rows that are KEPT, or of all rows, of which those that are not kept are written.

    With EVERY, of the M newest rows, as if each were kept; `upto` counts the kept tokens up to each one.
    """
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of a causal triangle start first
    group = b * GROUPS + h * GROUPS // HEADS
    positions += group * P
    is_kept += group * n
    upto += group * n
    sinks += b * S
    k += b * stride_kb + h // FACTOR * stride_kh
    v += b * stride_vb + h // FACTOR * stride_vh
    mask += b * stride_mb + h * stride_mh
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = row < M
    source = tl.minimum(row, M - 1).to(tl.int64)
    at = source  # where a query stands in the prompt
    first, last = block * BLOCK_M, tl.minimum((block + 1) * BLOCK_M, M) - 1
    if EVERY:
        at, first, last = at + (n - M), first + (n - M), last + (n - M)
    elif KEPT:
        at = tl.load(positions + at)
        first, last = tl.load(positions + first).to(tl.int32), tl.load(positions + last).to(tl.int32)
        source = at
    else:
        wanted = wanted & (tl.load(is_kept + at) == 0)
    tile = tl.load(
        q + b * stride_qb + h * stride_qh + source[:, None] * stride_qn + d[None, :],
        mask=wanted[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    state = (
        tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
    )  # fmt: skip
    if KEPT:
        kept_k += b * stride_xb + h // FACTOR * stride_xh
        kept_v += b * stride_yb + h // FACTOR * stride_yh
        kept_mask += b * stride_wb + h * stride_wh
        end, full = P, P  # kept keys that some row of the block sees, and that every one sees
        if CAUSAL:
            end = tl.minimum((block + 1) * BLOCK_M, P)
            full = block * BLOCK_M
            if EVERY:
                end, full = tl.load(upto + last), tl.load(upto + first)
                row = tl.load(upto + at) - 1  # the newest kept key that a query sees
        full = full // BLOCK_N * BLOCK_N
        state = _attend_columns(
            state, tile, kept_k, kept_v, positions, kept_mask, at, row, 0, full, end, scale, softcap, hidden_below,
            stride_xn, stride_yn, stride_mq, stride_wk, D, DV,
            False, 0, CAUSAL, CAPPED, MASK, ROW, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        state = _attend_columns(
            state, tile, kept_k, kept_v, positions, kept_mask, at, row, full, end, end, scale, softcap, hidden_below,
            stride_xn, stride_yn, stride_mq, stride_wk, D, DV,
            True, 0, CAUSAL, CAPPED, MASK, ROW, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    for start in range(0, S, BLOCK_S):
        sink = start + tl.arange(0, BLOCK_S)
        column = tl.load(sinks + sink, mask=sink < S, other=n)
        state = _attend_local(
            state, tile, k, v, is_kept, mask, at, column, column < n, window, scale, softcap, hidden_below,
            stride_kn, stride_vn, stride_mq, stride_mk, D, DV, True, KEPT, CAPPED, MASK, ROW, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    begin = tl.maximum(first - window + 1, 0)
    if not KEPT:
        begin = tl.where(tl.max(wanted.to(tl.int32), 0) > 0, begin, last + 1)  # nothing to do where all are kept
    for start in range(begin, last + 1, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        state = _attend_local(
            state, tile, k, v, is_kept, mask, at, column, column <= last, window, scale, softcap, hidden_below,
            stride_kn, stride_vn, stride_mq, stride_mk, D, DV, False, KEPT, CAPPED, MASK, ROW, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    _, total, result = state
    result = result * tl.where(total > 0, 1.0 / total, 0.0)[:, None]  # a row that sees nothing gets zeros
    pointers = out + b * stride_ob + h * stride_oh + source[:, None] * stride_on + dv[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=wanted[:, None] & (dv < DV)[None, :])


def window_tilings(q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[int, int, int, int]]:
    """Return tilings of kept rows, over all their keys, and of the others: queries and keys of a tile, warps, stages.

    The first is that of sparse_attention that takes few registers, since this kernel needs more. A taller or wider tile
    than the second's would reach further out of the window.
    """
    offered = tilings(q, v, mask)
    block_m, block_n, warps, stages = kept = offered[-1 if mask is not None and mask.shape[2] > 1 else 0]
    return [kept, (min(block_m, 64), min(block_n, 64), min(warps, 4), stages)]


def attend_window_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor, kept_v: torch.Tensor,
    positions: torch.Tensor, sinks: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, window: int, kept_window: bool, every_row: bool = False, kernel: str = "triton",
) -> torch.Tensor:  # fmt: skip
    """Attend as `window_attention` says; `sinks` is what `first_visible` returns, `kernel` that of sparse_attention."""
    if kept_window:
        out = empty_output(q, v)
    else:  # zeros in the other rows, which are written over
        out = sparse_attention(
            q, kept_k, kept_v, positions, mask, is_causal=is_causal, scale=scale, softcap=softcap, kernel=kernel
        )
    (batch, heads, m, width), n, p = q.shape, k.shape[2], positions.shape[2]
    is_kept = kept_tokens(positions, n)
    q, k, v, kept_k, kept_v = map(tiles.unit_stride, (q, k, v, kept_k, kept_v))
    shared = mask is None or mask.shape[2] == 1  # by all queries
    kept_mask = mask
    if kept_window and mask is not None and shared:  # the kept keys' part, read as it lies: [B, 1 or Hq, 1, P]
        kept_mask = take(mask, batch, None, positions if positions.shape[1] == 1 else per_head(positions, heads))
    of_kept = tiles.mask_arguments(kept_mask, q)
    common = {
        "q": q, "k": k, "v": v, "out": out, "is_kept": is_kept,
        "upto": is_kept.cumsum(2, dtype=torch.int32) if every_row else is_kept, "sinks": sinks.contiguous(),
        "kept_k": kept_k, "kept_v": kept_v, "positions": positions.contiguous(), "kept_mask": of_kept["mask"],
        "n": n, "P": p, "S": sinks.shape[1], "window": window,
        "scale": width**-0.5 if scale is None else scale, "softcap": softcap or 0.0,
        **tiles.strides(q=q, k=k, v=v, o=out, x=kept_k, y=kept_v), **tiles.mask_arguments(mask, q), "ROW": shared,
        **{f"stride_w{axis}": of_kept[f"stride_m{axis}"] for axis in "bhk"}, "D": width, "DV": v.shape[3],
        "HEADS": heads, "FACTOR": heads // k.shape[1], "GROUPS": positions.shape[1], "EVERY": every_row,
        "CAUSAL": is_causal, "CAPPED": softcap is not None, "BLOCK_S": SINKS,
        "BLOCK_D": tiles.head_blocks(width), "BLOCK_DV": tiles.head_blocks(v.shape[3]),
    }  # fmt: skip
    of_kept_rows, of_others = zip((True, False), (m if every_row else p, n), window_tilings(q, v, mask), strict=True)
    launches = [of_kept_rows] if every_row else [of_kept_rows, of_others] if kept_window else [of_others]
    for kept, rows, (block_m, block_n, warps, stages) in launches:
        launchable(_window_attention_kernel, q)[(triton.cdiv(rows, block_m), batch * heads)](
            **common, M=rows, KEPT=kept, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=warps, num_stages=tiles.pipelined(stages),
        )  # fmt: skip
    return out
