"""How much attention every token gets, measured on a few probe rows.

    A[b,h,i,j] = softmax_j(cap(scale * q[b,h,i] . k[b,h,j]) + mask[b,h,i,j])   for i in the probe rows R
    accumulated[b,g,j] = mean_{h in g} sum_{i in R} A[b,h,i,j]                 sums to the valid probe rows
    visible[b,j]       = number of rows in R that may see token j              (nnz in the paper)

`cap` is the softcap of Gemma 2, `c * tanh(s / c)`, where the model has one. R is the `recent` newest rows
and `random` rows drawn, seeded, from the others. `accumulated / visible` is the normalised score, which does not favour
old tokens only because more rows can see them.

On a GPU two kernels make two passes over the keys: softmax statistics of every probe row, then column sums. No score is
ever in memory, and the query heads of one KV head share the keys that they read.

Source: ZipVL (arXiv 2410.08584), probe tokens and accumulated / normalised attention scores.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from zipvl_compile.kernels.checks import check_attention_inputs, check_mask, fail
from zipvl_compile.kernels.dense_attention import soft_capped
from zipvl_compile.kernels.dispatch import launchable, use_triton
from zipvl_compile.kernels.masks import causal, rows_that_see, seen
from zipvl_compile.kernels.probe_rows import cached_probe_rows
from zipvl_compile.kernels.tiles import capped, dot, head_blocks, mask_arguments, masked, strides, unit_stride

MAX_SPLITS = 16  # parts of the keys that pass 1 reads in parallel
PROGRAMS = 1024  # enough to fill a large GPU several times
BLOCK_SCORES = 1 << 19  # scores that PyTorch computes at a time, 2 MiB


def _scores_torch(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float, softcap: float | None,
    rows: torch.Tensor, groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (batch, query_heads, given, _), (_, kv_heads, n, _), m = q.shape, k.shape, rows.numel()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    accumulated = torch.zeros(batch, groups, n, dtype=dtype, device=q.device)
    limits = rows.tolist()
    columns = torch.arange(n, device=q.device)
    probes = (q.index_select(2, rows) if given == n else q).to(dtype) * scale  # [B, Hq, m, D]
    factor = query_heads // kv_heads
    # A block of rows whose scores stay in the L2 cache from the product to the sums.
    step = max(BLOCK_SCORES // (factor * n), 4)
    space = probes.new_empty(min(step, m) * factor * n)
    for start in range(0, m, step):
        block = slice(start, min(start + step, m))
        at = rows[block]
        # Causality hides what comes after a block's last row from all of it, and nothing up to its first row.
        first, end = (limits[start] + 1, limits[block][-1] + 1) if is_causal else (n, n)
        hidden = ~causal(at, columns[first:end])
        if mask is not None:
            part = (mask if mask.shape[2] == 1 else mask.index_select(2, at))[..., :end].expand(batch, -1, -1, -1)
            may_see = seen(part, at, is_causal)  # [B, H or 1, rows, end]
        for b, head in itertools.product(range(batch), range(kv_heads)):
            heads = slice(head * factor, (head + 1) * factor)
            packed = probes[b, heads, block].flatten(0, 1)  # [factor * rows, D]
            scores = space[: packed.shape[0] * end].view(-1, end)
            torch.mm(packed, k[b, head, :end].to(dtype).t(), out=scores)
            scores = scores.view(factor, -1, end)
            if softcap is not None:
                scores.copy_(soft_capped(scores, softcap))
            if mask is None:
                scores[..., first:].masked_fill_(hidden, float("-inf"))
                torch.softmax(scores, -1, out=scores)
            else:
                own = slice(None) if mask.shape[1] == 1 else heads
                if part.is_floating_point():
                    scores += part[b, own]
                scores.masked_fill_(~may_see[b, own], float("-inf"))
                torch.softmax(scores, -1, out=scores)
                # A row that sees nothing is padding: it gives no score and does not count.
                scores.masked_fill_(~may_see[b, own].any(-1, keepdim=True), 0.0)
            accumulated[b, head * groups // kv_heads, :end] += scores.view(-1, end).sum(0)
    return accumulated / (query_heads // groups), rows_that_see(mask, rows, is_causal, batch, n, dtype)


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
    pointers = mask + (r // m).to(tl.int64)[:, None] * stride_mh + columns.to(tl.int64)[None, :] * stride_mk
    if not ROW:
        pointers += at[:, None] * stride_mq
    return masked(scores, shown, pointers, hidden_below, MASK)


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
def _column_sums_kernel(
    q, k, mask, rows, maxima, sums, out, seen, used, n, m, scale, softcap, hidden_below,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_mb, stride_mh, stride_mq, stride_mk, D,
    KV_HEADS: tl.constexpr, FACTOR: tl.constexpr, COMPACT: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    MASK: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Attention that the probe rows of one KV head give to each key, and (first head) how many rows see the key."""
    b, h = (tl.program_id(1) // KV_HEADS).to(tl.int64), (tl.program_id(1) % KV_HEADS).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    q += b * stride_qb + h * FACTOR * stride_qh
    k += b * stride_kb + h * stride_kh
    mask += b * stride_mb + h * FACTOR * stride_mh
    statistics = tl.program_id(1).to(tl.int64) * FACTOR * m * SPLITS
    splits = tl.arange(0, SPLITS)
    weights = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, FACTOR * m, BLOCK_M):
        r = start + tl.arange(0, BLOCK_M)
        inside = (r < FACTOR * m)[:, None] & (splits < used)[None, :]
        where = statistics + r[:, None] * SPLITS + splits[None, :]
        tops = tl.load(maxima + where, mask=inside, other=float("-inf"))  # [M, SPLITS]
        top = tl.max(tops, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.load(sums + where, mask=inside, other=0.0) * tl.exp2(tops - top[:, None]), 1)
        tile, at = _probe_tile(q, rows, r, m, FACTOR * m, stride_qh, stride_qn, D, COMPACT, BLOCK_D)
        scores = _tile_scores(
            tile, at, r, k, mask, columns, n, m, scale, softcap, hidden_below,
            stride_kn, stride_mh, stride_mq, stride_mk, D, CAUSAL, CAPPED, MASK, ROW, BLOCK_D,
        )  # fmt: skip
        # A row that sees nothing is padding: total is 0, it gives no score and does not count.
        share = tl.where(total > 0, 1.0 / total, 0.0)
        weights += tl.sum(tl.exp2(scores - top[:, None]) * share[:, None], 0)
        count += tl.sum(((scores > float("-inf")) & (r < m)[:, None]).to(tl.float32), 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * n + columns, weights, mask=columns < n)
    if h == 0:
        tl.store(seen + b * n + columns, count, mask=columns < n)


def _scores_triton(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float, softcap: float | None,
    rows: torch.Tensor, groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k = unit_stride(q), unit_stride(k)
    (batch, query_heads, given, width), (_, kv_heads, n, _) = q.shape, k.shape
    factor, m = query_heads // kv_heads, rows.numel()
    block_d = head_blocks(width)
    row_bytes = block_d * q.element_size()
    block_m, block_n = (64, 128) if row_bytes <= 128 else (64, 64)
    if q.dtype == torch.float32 and block_d >= 128:  # multiplied without tensor cores, from registers
        block_m, block_n = (32, 16) if block_d == 128 else (16, 16)
    blocks = triton.cdiv(factor * m, block_m)
    splits = min(max(PROGRAMS // (batch * kv_heads * blocks), 1), MAX_SPLITS)
    part = triton.cdiv(triton.cdiv(n, splits), block_n) * block_n
    used = triton.cdiv(n, part)
    statistics = torch.empty(2, batch, kv_heads, factor * m, MAX_SPLITS, dtype=torch.float32, device=q.device)
    weights = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=q.device)
    seen = torch.empty(batch, n, dtype=torch.float32, device=q.device)
    common = {
        "n": n, "m": m, "scale": scale, "softcap": softcap or 0.0,
        **strides(q=q, k=k), "D": width, **mask_arguments(mask, q),
        "KV_HEADS": kv_heads, "FACTOR": factor, "COMPACT": given != n, "CAUSAL": is_causal,
        "CAPPED": softcap is not None, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d,
        "SPLITS": MAX_SPLITS, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    common |= {"q": q, "k": k, "rows": rows, "maxima": statistics[0], "sums": statistics[1]}
    launchable(_row_statistics_kernel, q)[(blocks, batch * kv_heads, used)](**common, part=part)
    launchable(_column_sums_kernel, q)[(triton.cdiv(n, block_n), batch * kv_heads)](
        **common, used=used, out=weights, seen=seen
    )
    if mask is not None and mask.shape[1] > 1:  # the kernel counts for the first head
        seen = rows_that_see(mask, rows, is_causal, batch, n, torch.float32)
    per_group = query_heads // groups
    return weights.view(batch, groups, kv_heads // groups, n).sum(2) / per_group, seen


@torch.library.custom_op("zipvl::token_scores", mutates_args=())
def _token_scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, recent: int, random: int, seed: int, groups: int, use: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check_attention_inputs("token_scores", q, k, None)
    batch, _, given, _ = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    check_mask("token_scores", mask, q, n, n)
    rows = cached_probe_rows(n, recent, random, seed, q.device)  # [m]
    if given not in (n, rows.numel()):
        fail(
            "token_scores", "q", f"{n} tokens, like k, or the {rows.numel()} probe rows", given,
            "Only a prefill of a whole prompt is scored.",
        )  # fmt: skip
    if kv_heads % groups != 0:
        fail("token_scores", "groups", f"a divisor of {kv_heads} KV heads", groups, "Use 1 or the KV head count.")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if batch == 0 or n == 0:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_zeros(batch, groups, n, dtype=dtype), q.new_zeros(batch, n, dtype=dtype)
    run = _scores_triton if use_triton("token_scores", use, q, k) else _scores_torch
    return run(q, k, mask, is_causal, scale, softcap, rows, groups)


@_token_scores.register_fake
def _(q, k, mask, is_causal, scale, softcap, recent, random, seed, groups, use="auto"):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, n = q.shape[0], k.shape[2]
    return q.new_empty(batch, groups, n, dtype=dtype), q.new_empty(batch, n, dtype=dtype)


def token_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    recent: int = 64,
    random: int = 64,
    seed: int = 0,
    groups: int = 1,
    use: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure every token's accumulated attention score on the probe rows.

    Args:
        q: queries `[B, Hq, n, D]`, or those of the probe rows only `[B, Hq, m, D]`; fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, n, D]`, same dtype; `Hkv` divides `Hq`.
        mask: bool (True = visible) or additive float, `[B or 1, Hq or 1, n or 1, n]`.
        is_causal: hide later tokens, in addition to `mask`.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        recent, random, seed: the probe rows, see `probe_rows`.
        groups: 1 averages all heads, `Hkv` keeps a score per KV head.
        use: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        accumulated `[B, groups, n]` and visible `[B, n]` (probe rows that may see the token), fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: ZipVL (arXiv 2410.08584), accumulated and normalised attention scores on probe tokens.
    """
    return torch.ops.zipvl.token_scores(q, k, mask, is_causal, scale, softcap, recent, random, seed, groups, use)
