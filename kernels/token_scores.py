"""How much attention every token gets, measured on a few probe rows.

    A[b,h,i,j] = softmax_j(cap(scale * q[b,h,i] . k[b,h,j]) + mask[b,h,i,j])   for i in the probe rows R
    accumulated[b,g,j] = mean_{h in g} sum_{i in R} A[b,h,i,j]                 sums to the valid probe rows
    visible[b,j]       = number of rows in R that may see token j              (nnz in the paper)

`cap` is the softcap of Gemma 2, `c * tanh(s / c)`, where the model has one. R is the `recent_probes` newest
rows and `random_probes` rows drawn, seeded, from the others. `accumulated / visible` is the normalised score, which
does not favour old tokens only because more rows can see them. Where attention is spread it still does: an early row
shares its attention among few tokens. `even` weighs each row by the share of the prompt that it sees, so that a row
that looks at all its tokens alike gives the same to each, wherever it stands.

On a GPU two kernels make two passes over the keys: softmax statistics of every probe row, then column sums. No score is
ever in memory, and the query heads of one KV head share the keys that they read. Inductor compiles the kernels with the
graph.

Source: ZipVL (arXiv 2410.08584), probe tokens and accumulated / normalised attention scores.
"""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.kernels.common.checks import check_attention_inputs, check_mask, fail
from zipvl_compile.kernels.common.dispatch import is_traced, launchable, use_triton
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.common.masks import rows_that_see, share_seen
from zipvl_compile.kernels.common.tiles import (
    capped,
    dot,
    head_blocks,
    mask_arguments,
    masked,
    pipelined,
    strides,
    unit_stride,
)  # fmt: skip
from zipvl_compile.kernels.probe_rows import probe_positions
from zipvl_compile.kernels.token_scores_torch import token_scores_torch

MAX_SPLITS = 32  # parts of the keys that are read in parallel
PROGRAMS = 1024  # enough to fill a large GPU several times


@triton.jit
def _probe_tile(q, rows, r, m, factor_m, stride_qh, stride_qn, D, COMPACT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries of the packed rows `r` (head * m + probe) and their positions in the prompt; -1 outside."""
    d = tl.arange(0, BLOCK_D)
    inside = r < factor_m
    at = tl.load(rows + r % m, mask=inside, other=-1)  # [M]
    row = (r % m).to(tl.int64) if COMPACT else at
    pointers = q + (r // m).to(tl.int64)[:, None] * stride_qh + row[:, None] * stride_qn + d[None, :]
    return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0), at


@triton.jit
def _tile_scores(
    tile, at, r, k, mask, columns, n, m, scale, softcap, hidden_below,
    stride_kn, stride_mh, stride_mq, stride_mk, D,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr, ROW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Base-2 scores `[M, N]` of a tile of probe rows over the keys at `columns`."""
    d = tl.arange(0, BLOCK_D)
    inside = columns < n
    keys = tl.load(
        k + columns.to(tl.int64)[None, :] * stride_kn + d[:, None],
        mask=inside[None, :] & (d < D)[:, None], other=0.0,
    )  # fmt: skip
    scores = capped(dot(tile, keys), scale, softcap, CAPPED)
    shown = inside[None, :] & (at >= 0)[:, None]
    if CAUSAL:
        shown = shown & (columns[None, :] <= at[:, None])
    wide = columns.to(tl.int64)
    if ROW:
        pointers = mask + wide * stride_mk
    else:
        row = (r // m).to(tl.int64) * stride_mh + at * stride_mq
        pointers = mask + row[:, None] + wide[None, :] * stride_mk
    return masked(scores, shown, inside, pointers, hidden_below, MASK, ROW)


@triton.jit
def _row_statistics_kernel(
    q, k, mask, rows, maxima, sums, n, m, part, scale, softcap, hidden_below,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_mb, stride_mh, stride_mq, stride_mk, D,
    KV_HEADS: tl.constexpr, FACTOR: tl.constexpr, COMPACT: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    MASK: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of every packed probe row over one part of the keys."""
    b, h = (tl.program_id(1) // KV_HEADS).to(tl.int64), (tl.program_id(1) % KV_HEADS).to(tl.int64)
    split = tl.program_id(2)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q += b * stride_qb + h * FACTOR * stride_qh
    k += b * stride_kb + h * stride_kh
    mask += b * stride_mb + h * FACTOR * stride_mh
    tile, at = _probe_tile(q, rows, r, m, FACTOR * m, stride_qh, stride_qn, D, COMPACT, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum((split + 1) * part, n)
    if CAUSAL:
        end = tl.minimum(end, tl.max(at, 0).to(tl.int32) + 1)
    for start in range(split * part, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = _tile_scores(
            tile, at, r, k, mask, columns, n, m, scale, softcap, hidden_below,
            stride_kn, stride_mh, stride_mq, stride_mk, D, CAUSAL, CAPPED, MASK, ROW, BLOCK_D,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = new
    out = (tl.program_id(1).to(tl.int64) * FACTOR * m + r) * SPLITS + split
    tl.store(maxima + out, top, mask=r < FACTOR * m)
    tl.store(sums + out, total, mask=r < FACTOR * m)


@triton.jit
def _join_statistics_kernel(maxima, sums, norms, count, used, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Base-2 logarithm of the sum of exponentials of every row; infinity for padding, which sees nothing."""
    r = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    inside = (r < count)[:, None] & (splits < used)[None, :]
    where = r[:, None] * SPLITS + splits[None, :]
    tops = tl.load(maxima + where, mask=inside, other=float("-inf"))  # [BLOCK, SPLITS]
    top = tl.max(tops, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.load(sums + where, mask=inside, other=0.0) * tl.exp2(tops - base[:, None]), 1)
    norm = base + tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(norms + r, tl.where(total > 0, norm, float("inf")), mask=r < count)


@triton.jit
def _column_sums_kernel(
    q, k, mask, rows, norms, out, n, m, part, scale, softcap, hidden_below,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_mb, stride_mh, stride_mq, stride_mk, D,
    KV_HEADS: tl.constexpr, FACTOR: tl.constexpr, COMPACT: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    MASK: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention that one block of probe rows of a KV head gives to each key of one part."""
    b, h = (tl.program_id(1) // KV_HEADS).to(tl.int64), (tl.program_id(1) % KV_HEADS).to(tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q += b * stride_qb + h * FACTOR * stride_qh
    k += b * stride_kb + h * stride_kh
    mask += b * stride_mb + h * FACTOR * stride_mh
    tile, at = _probe_tile(q, rows, r, m, FACTOR * m, stride_qh, stride_qn, D, COMPACT, BLOCK_D)
    inside = r < FACTOR * m
    norm = tl.load(norms + tl.program_id(1).to(tl.int64) * FACTOR * m + r, mask=inside, other=float("inf"))  # [M]
    out += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * n
    first = tl.program_id(2) * part
    for start in range(first, tl.minimum(first + part, n), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = _tile_scores(
            tile, at, r, k, mask, columns, n, m, scale, softcap, hidden_below,
            stride_kn, stride_mh, stride_mq, stride_mk, D, CAUSAL, CAPPED, MASK, ROW, BLOCK_D,
        )  # fmt: skip
        tl.store(out + columns, tl.sum(tl.exp2(scores - norm[:, None]), 0), mask=columns < n)


def _tiling(dtype: torch.dtype, block_d: int, rows: int) -> dict[str, int]:
    """Return probe rows and keys of a tile, warps and stages, for at most `rows` packed probe rows."""
    if dtype == torch.float32:  # multiplied without tensor cores, from registers
        m, n = (64, 64) if block_d < 128 else (32, 16) if block_d == 128 else (16, 16)
        return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 2}
    if block_d > 128 or rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": pipelined(3 if block_d <= 128 else 2)}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": pipelined(3)}


@torch.library.triton_op("zipvl::token_scores", mutates_args=())
def _token_scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, recent_probes: int, random_probes: int, seed: int, groups: int, even: bool = False,
    kernel_: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if not is_traced(q):
        _check(q, k, mask, recent_probes + random_probes, groups)
    (batch, query_heads, given, width), (_, kv_heads, n, _) = q.shape, k.shape
    if not use_triton("token_scores", kernel_, q, k) or q.numel() == 0 or k.numel() == 0:
        probes = (recent_probes, random_probes, seed)
        return token_scores_torch(q, k, mask, is_causal, scale, softcap, *probes, groups, even)
    q, k = unit_stride(q), unit_stride(k)
    rows = probe_positions(k, recent_probes, random_probes, seed)
    factor, m = query_heads // kv_heads, rows.shape[0]
    block_d = head_blocks(width)
    tiling = _tiling(q.dtype, block_d, factor * (recent_probes + random_probes))
    block_n = tiling["BLOCK_N"]
    blocks = (factor * m + tiling["BLOCK_M"] - 1) // tiling["BLOCK_M"]
    splits = torch.sym_min(torch.sym_max(PROGRAMS // (batch * kv_heads * blocks), 1), MAX_SPLITS)
    part = ((n + splits - 1) // splits + block_n - 1) // block_n * block_n
    used = (n + part - 1) // part
    count = batch * query_heads * m
    maxima, sums = (q.new_empty(count, MAX_SPLITS, dtype=torch.float32) for _ in range(2))
    norms = q.new_empty(count, dtype=torch.float32)
    weights = q.new_empty(batch, groups, kv_heads // groups * blocks, n, dtype=torch.float32)
    common = {
        "n": n, "m": m, "part": part, "scale": width**-0.5 if scale is None else scale, "softcap": softcap or 0.0,
        **strides(q=q, k=k), "D": width, **mask_arguments(mask, q),
        "KV_HEADS": kv_heads, "FACTOR": factor, "CAUSAL": is_causal, "CAPPED": softcap is not None,
        "COMPACT": _holds_probes_only(given, n, m), "BLOCK_D": block_d, **tiling,
    }  # fmt: skip
    common |= {"q": q, "k": k, "rows": rows}
    grid = (blocks, batch * kv_heads, used)
    launchable(_row_statistics_kernel, q)[grid](**common, maxima=maxima, sums=sums, SPLITS=MAX_SPLITS)
    launchable(_join_statistics_kernel, q)[((count + 127) // 128,)](
        maxima, sums, norms, count, used, SPLITS=MAX_SPLITS, BLOCK=128, num_warps=4
    )
    if even:
        shares = share_seen(mask, rows, is_causal, n, torch.float32).log2().expand(batch, query_heads, m)
        norms = norms - shares.reshape(count)
    launchable(_column_sums_kernel, q)[grid](**common, norms=norms, out=weights)
    return weights.sum(2) / (query_heads // groups), rows_that_see(mask, rows, is_causal, batch, n, torch.float32)


def _holds_probes_only(given, n, m) -> bool:
    """Return whether `given` queries are those of the m probe rows, not of all n tokens; sizes may be symbolic."""
    if statically_known_true(given == n):
        return False
    return statically_known_true(given == m) or bool(given != n)


def _check(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, probes: int, groups: int) -> None:
    check_attention_inputs("token_scores", q, k, None)
    given, kv_heads, n = q.shape[2], k.shape[1], k.shape[2]
    check_mask("token_scores", mask, q, n, n)
    if given not in (n, min(n, probes)):
        fail(
            "token_scores", "q", f"{n} tokens, like k, or the {min(n, probes)} probe rows", given,
            "Only a prefill of a whole prompt is scored.",
        )  # fmt: skip
    if kv_heads % groups != 0:
        fail("token_scores", "groups", f"a divisor of {kv_heads} KV heads", groups, "Use 1 or the KV head count.")


def token_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    recent_probes: int = 64,
    random_probes: int = 64,
    seed: int = 0,
    groups: int = 1,
    even: bool = False,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure every token's accumulated attention score on the probe rows.

    Args:
        q: queries `[B, Hq, n, D]`, or those of the probe rows only `[B, Hq, m, D]`; fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, n, D]`, same dtype; `Hkv` divides `Hq`.
        mask: bool (True = visible) or additive float, `[B or 1, Hq or 1, n or 1, n]`.
        is_causal: hide later tokens, in addition to `mask`.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        recent_probes, random_probes, seed: the probe rows, see `probe_rows`.
        groups: 1 averages all heads, `Hkv` keeps a score per KV head.
        even: weigh each probe row by the share of the prompt that it sees.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        accumulated `[B, groups, n]` and visible `[B, n]` (probe rows that may see the token), fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: ZipVL (arXiv 2410.08584), accumulated and normalised attention scores on probe tokens.
    """
    probes = (recent_probes, random_probes, seed)
    return torch.ops.zipvl.token_scores(q, k, mask, is_causal, scale, softcap, *probes, groups, even, kernel)
