"""Prefill attention among the kept tokens only.

    o[b, h, T_i] = softmax(cap(scale * q[T_i] . K[T]^T) + mask[T_i, T]) V[T]      kept queries
    o[b, h, i]   = 0                                                             for i not in T   (queries="selected")
    o[b, h, i]   = o[b, h, max {t in T : t <= i}]                                for i not in T   (queries="hold")

T is ascending, so a causal mask over kept tokens is again a plain causal mask and the work is dense attention
over p tokens. With queries="all", every query attends to the kept keys that it may see.

The Triton kernel reads queries and writes results through T, and writes the zeros of the other rows in the same pass.
The alternative gathers the queries and hands dense tensors to PyTorch, a padded batch sample by sample
(`ragged_attention`); `kernel="auto"` measures them per kind of shape.

Source: ZipVL (arXiv 2410.08584), sparse attention on important tokens.
"""

from __future__ import annotations

import functools

import torch

from zipvl_compile.kernels.common import autotune, tiles
from zipvl_compile.kernels.common.checks import check_attention_inputs, check_mask, check_positions, fail, per_head
from zipvl_compile.kernels.common.dispatch import launchable, use_triton
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.common.masks import take
from zipvl_compile.kernels.common.tiles import absorb, capped, dot, masked
from zipvl_compile.kernels.common.token_copies import take_rows
from zipvl_compile.kernels.held_rows import held_rows
from zipvl_compile.kernels.ragged_attention import attend_ragged, is_ragged
from zipvl_compile.kernels.sparse_attention_torch import attend_cudnn, attend_torch, empty_output

KEPT_OF_ALL, KEPT_ONLY, ALL = 0, 1, 2  # which queries come in, and what becomes of them


@triton.jit
def _zero_rows(out, first, last, stride_on, DV, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Write zeros to the rows from `first` up to `last`."""
    d = tl.arange(0, BLOCK_DV)
    zeros = tl.zeros([BLOCK_M, BLOCK_DV], out.dtype.element_ty)
    for start in range(first, last, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        pointers = out + at.to(tl.int64)[:, None] * stride_on + d[None, :]
        tl.store(pointers, zeros, mask=(at < last)[:, None] & (d < DV)[None, :])


@triton.jit
def _attend_columns(
    state, tile, k, v, positions, mask, at, row, first, last, end, scale, softcap, hidden_below,
    stride_kn, stride_vn, stride_mq, stride_mk, D, DV,
    EDGE: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr,
    ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Online softmax over the kept keys from `first` to `last`; away from the EDGE every query sees all of them."""
    top, total, result = state
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        exists = column < end
        wide = column.to(tl.int64)
        keys = tl.load(k + wide[None, :] * stride_kn + d[:, None], mask=exists[None, :] & (d < D)[:, None], other=0.0)
        scores = capped(dot(tile, keys), scale, softcap, CAPPED)  # [BLOCK_M, BLOCK_N]
        shown = exists[None, :]
        pointers = mask
        if (MASK != 0 and not ROW) or QUERIES == 2:
            where = tl.load(positions + column, mask=exists, other=0)  # [BLOCK_N]
        if EDGE and CAUSAL:
            shown = shown & (where[None, :] <= at[:, None] if QUERIES == 2 else column[None, :] <= row[:, None])
        if MASK != 0:
            pointers = mask + wide * stride_mk if ROW else mask + at[:, None] * stride_mq + where[None, :] * stride_mk
        if EDGE or MASK != 0:
            scores = masked(scores, shown, exists, pointers, hidden_below, MASK, ROW)
        values = tl.load(
            v + wide[:, None] * stride_vn + dv[None, :], mask=exists[:, None] & (dv < DV)[None, :], other=0.0
        )
        top, total, result = absorb(top, total, result, scores, values)
    return top, total, result


@triton.jit
def _sparse_attention_kernel(
    q, k, v, out, positions, limits, mask, n, M, P, scale, softcap, hidden_below,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_mb, stride_mh, stride_mq, stride_mk, D, DV,
    HEADS: tl.constexpr, FACTOR: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr, MASK: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of queries over the kept keys. QUERIES: 0 the kept ones among all, 1 the kept ones only, 2 all."""
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of a causal triangle start first
    group = b * GROUPS + h * GROUPS // HEADS
    positions += group * P
    k += b * stride_kb + h // FACTOR * stride_kh
    v += b * stride_vb + h // FACTOR * stride_vh
    out += b * stride_ob + h * stride_oh
    mask += b * stride_mb + h * stride_mh
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    at = tl.minimum(row, M - 1).to(tl.int64)  # where a query stands in the prompt
    if QUERIES != 2:
        at = tl.load(positions + at)
    source = at if QUERIES == 0 else row.to(tl.int64)  # where it stands in q and out
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if QUERIES == 0:  # the rows between the kept ones get zeros; those of this block are written over below
        start = tl.load(positions + block * BLOCK_M, mask=block > 0, other=0)
        stop = tl.load(positions + (block + 1) * BLOCK_M, mask=(block + 1) * BLOCK_M < P, other=n)
        _zero_rows(out, start, stop, stride_on, DV, BLOCK_M, BLOCK_DV)
        tl.debug_barrier()
    queries = q + b * stride_qb + h * stride_qh + source[:, None] * stride_qn + d[None, :]
    tile = tl.load(queries, mask=inside[:, None] & (d < D)[None, :], other=0.0)

    end, full = P, P  # keys that some query of the block sees, and that every one sees
    if CAUSAL:
        if QUERIES == 2:
            limits += group * tl.num_programs(0) + block
            end = tl.load(limits).to(tl.int32)
            full = tl.load(limits - 1).to(tl.int32) if block > 0 else 0
        else:
            end = tl.minimum((block + 1) * BLOCK_M, P)
            full = block * BLOCK_M
    full = full // BLOCK_N * BLOCK_N
    state = (
        tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
    )  # fmt: skip
    state = _attend_columns(
        state, tile, k, v, positions, mask, at, row, 0, full, end, scale, softcap, hidden_below,
        stride_kn, stride_vn, stride_mq, stride_mk, D, DV,
        False, QUERIES, CAUSAL, CAPPED, MASK, ROW, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    _, total, result = _attend_columns(
        state, tile, k, v, positions, mask, at, row, full, end, end, scale, softcap, hidden_below,
        stride_kn, stride_vn, stride_mq, stride_mk, D, DV,
        True, QUERIES, CAUSAL, CAPPED, MASK, ROW, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    result = result * tl.where(total > 0, 1.0 / total, 0.0)[:, None]  # a query that sees no kept key gets zeros
    pointers = out + source[:, None] * stride_on + dv[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :])


def tilings(q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[int, int, int, int]]:
    """Return the tilings worth trying, best guess first: queries and keys of a tile, warps, stages.

    docs/kernels.md shows that these fit: a mask with a row per query takes registers, and fp32 is multiplied without
    tensor cores.
    """
    masked = mask is not None and mask.shape[2] > 1
    width = max(tiles.head_blocks(q.shape[3]), tiles.head_blocks(v.shape[3]))
    if q.dtype == torch.float32:
        return [(64, 32, 4, 2)] if width <= 64 else [(32, 16, 4, 2)] if width <= 128 else [(16, 16, 4, 1)]
    if width <= 64:
        return [(128, 32, 4, 3), (64, 32, 4, 3)] if masked else [(128, 64, 4, 3), (128, 128, 8, 3)]
    if width <= 128:
        large = [] if torch.version.hip else [(128, 128, 8, 2)]  # more than the 64 KiB of CDNA3
        if mask is not None and not masked:
            return [(64, 64, 4, 3), (128, 64, 8, 3)]
        return [(128, 32, 8, 3), (64, 32, 4, 3)] if masked else [(128, 64, 8, 3), *large]
    return [(64, 32, 8, 2)] if masked else [(64, 32, 4, 2), (128, 32, 8, 2)]


def _attend_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, scale: float | None, softcap: float | None, every_query: bool, tiling: tuple[int, int, int, int],
) -> torch.Tensor:  # fmt: skip
    out = empty_output(q, v)
    q, k, v, positions = tiles.unit_stride(q), tiles.unit_stride(k), tiles.unit_stride(v), positions.contiguous()
    (batch, heads, m, width), p = q.shape, positions.shape[2]
    block_m, block_n, warps, stages = tiling
    n = m if mask is None else mask.shape[3]
    shared = mask is None or mask.shape[2] == 1  # by all queries
    if mask is not None and shared:  # the kept keys' part, read as it lies: [B, 1 or Hq, 1, P]
        mask = take(mask, batch, None, positions if positions.shape[1] == 1 else per_head(positions, heads))
    blocks = triton.cdiv(m if every_query else p, block_m)
    limits = positions
    if every_query and is_causal:  # how many kept tokens stand at or before the last query of each block
        ends = torch.arange(1, blocks + 1, device=q.device) * block_m - 1
        limits = torch.searchsorted(positions, ends.expand(*positions.shape[:2], -1).contiguous(), right=True)
    launchable(_sparse_attention_kernel, q)[(blocks, batch * heads)](
        q, k, v, out, positions, limits, n=n, M=m if every_query else p, P=p,
        scale=width**-0.5 if scale is None else scale, softcap=softcap or 0.0,
        **tiles.strides(q=q, k=k, v=v, o=out),
        D=width, DV=v.shape[3], **tiles.mask_arguments(mask, q) | {"ROW": shared},
        HEADS=heads, FACTOR=heads // k.shape[1], GROUPS=positions.shape[1],
        QUERIES=ALL if every_query else KEPT_ONLY if m == p else KEPT_OF_ALL,
        CAUSAL=is_causal, CAPPED=softcap is not None, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=tiles.head_blocks(width), BLOCK_DV=tiles.head_blocks(v.shape[3]),
        num_warps=warps, num_stages=tiles.pipelined(stages),
    )  # fmt: skip
    return out


@torch.library.custom_op("zipvl::sparse_attention", mutates_args=())
def _sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, scale: float | None, softcap: float | None, queries: str, kernel_: str = "auto",
) -> torch.Tensor:  # fmt: skip
    if queries not in ("selected", "hold", "all"):
        fail("sparse_attention", "queries", '"selected", "hold" or "all"', repr(queries), 'Use "selected".')
    batch, _, m, _ = q.shape
    check_positions("sparse_attention", positions, batch, k.shape[1])
    p = positions.shape[2]
    if queries == "hold" and m != p and q.numel() > 0:
        few = take_rows(q, positions, q.new_empty(batch, q.shape[1], p, q.shape[3]))
        kept = torch.ops.zipvl.sparse_attention(
            few, k, v, positions, mask, is_causal, scale, softcap, "selected", kernel_
        )
        return take_rows(kept, held_rows(positions, m), empty_output(q, v))
    if mask is not None and mask.shape[0] == 0:  # what hiding_rows gives for a mask that hides nothing
        mask = None
    n = m if mask is None or m != p else mask.shape[-1]  # queries of the kept tokens only may come with a full mask
    if queries == "all" and m != n:
        fail("sparse_attention", "q", f"{n} tokens, like the mask", m, "Pass the queries of every token.")
    rows = min(k.shape[2], v.shape[2])
    if rows < p:
        fail("sparse_attention", "k, v", f"at least {p} kept tokens", rows, "Gather them with these positions.")
    buffers = k, v
    k, v = k[:, :, :p], v[:, :, :p]
    check_attention_inputs("sparse_attention", q, k, v)
    check_mask("sparse_attention", mask, q, n, n)
    if q.numel() == 0 or v.numel() == 0:
        return empty_output(q, v).zero_()
    arguments = (q, k, v, positions, mask, is_causal, scale, softcap, queries == "all" and p < n)
    by_sample = None
    if mask is not None and not arguments[8] and is_ragged(mask, positions, is_causal, softcap):
        by_sample = functools.partial(attend_ragged, q, *buffers, positions, mask, scale)
    if not use_triton("sparse_attention", kernel_, q, k, v):
        return attend_torch(*arguments) if by_sample is None else by_sample()
    candidates: autotune.Candidates = {
        f"triton {tiling}": functools.partial(_attend_triton, *arguments, tiling) for tiling in tilings(q, v, mask)
    }
    if kernel_ == "triton":
        return next(iter(candidates.values()))()
    kind = None if mask is None else (mask.dtype, mask.shape[1] > 1, mask.shape[2] > 1)
    shape = (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3], autotune.bucket(p), autotune.bucket(m))
    key = ("sparse_attention", q.device, q.dtype, shape, kind, is_causal, softcap is None, arguments[8])
    candidates["torch"] = functools.partial(attend_torch, *arguments)
    if mask is None and is_causal and softcap is None and not arguments[8]:
        candidates["cudnn"] = functools.partial(attend_cudnn, q, *buffers, positions, scale)
    if by_sample is not None:
        candidates |= {"ragged": by_sample, "ragged cudnn": functools.partial(by_sample, cudnn=True)}
    return autotune.run(key, candidates, q.device)


@_sparse_attention.register_fake
def _(q, k, v, positions, mask, is_causal, scale, softcap, queries, kernel_="auto"):
    return empty_output(q, v)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    queries: str = "selected",
    kernel: str = "auto",
) -> torch.Tensor:
    """Attend among the kept tokens and write the results to their rows.

    Args:
        q: queries of every token `[B, Hq, n, D]`, or of the kept ones only `[B, Hq, P, D]`.
        k, v: kept keys `[B, Hkv, >= P, D]` and values `[B, Hkv, >= P, Dv]`. Rows after the first `P` have no effect,
            but on a GPU those of `v` must be finite, as what gather_tokens and with_room return.
        positions: int64 `[B, G, P]`, ascending, where the kept tokens stand in the prompt.
        mask: over the whole prompt, bool or additive float, `[B or 1, Hq or 1, n or 1, n]`; one of 0 samples, which
            `hiding_rows` may return, hides nothing.
        is_causal: hide later tokens, in addition to `mask`.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        queries: whose attention output there is, that of the "selected" (kept) tokens or of "all"; with "hold", a token
            that is not kept gets the output of the kept one before it, or of the first kept one.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, Hq, n, Dv]`, token-major in memory; zero rows for tokens without attention output. `[B, Hq, P, Dv]` for
        the queries of the kept tokens only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: ZipVL (arXiv 2410.08584), sparse attention on important tokens.
    """
    return torch.ops.zipvl.sparse_attention(q, k, v, positions, mask, is_causal, scale, softcap, queries, kernel)
