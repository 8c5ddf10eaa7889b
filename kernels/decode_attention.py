"""Attention of new tokens over the compacted cache.

    keys = [K[T]; later keys],  the i-th of them at logical position  T_i  for i < P,  prompt_length + i - P  after that
    o = softmax(cap(scale * q . keys^T) + mask[:, positions]) values

On a GPU parallel programs read parts of the keys (flash-decoding), and a second kernel joins the parts. The query heads
of one KV head and the new tokens are the rows of one tile, so that the cache is read once. Inductor compiles both
kernels with the graph.

Source: ZipVL (arXiv 2410.08584), decoding over the KV cache of important tokens.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common import tiles
from zipvl_compile.kernels.common.dispatch import has_known_sizes, is_traced, launchable, use_triton
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.common.tiles import absorb, capped, dot, masked
from zipvl_compile.kernels.decode_attention_torch import check, decode_in_graph, empty_output
from zipvl_compile.kernels.token_positions import cached_count

PROGRAMS = 1024  # enough to fill a large GPU several times
MAX_SPLITS = 64


# Helpers take pointers only to write: of one that gives something back, Inductor takes every pointer for written to.
@triton.jit
def rows_of_tile(m, FACTOR: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the (head, new token) rows that share a KV head: their numbers, whether they exist, heads and tokens."""
    r = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    return r, r < FACTOR * m, (r // m).to(tl.int64), (r % m).to(tl.int64)


@triton.jit
def mask_offsets(where, head, token, stride_mh, stride_mq, stride_mk, ROW: tl.constexpr):
    """Return where a mask speaks of tokens, by where they stand in the sequence."""
    if ROW:
        offsets = where * stride_mk
    else:
        offsets = head[:, None] * stride_mh + token[:, None] * stride_mq + where[None, :] * stride_mk
    return offsets


@triton.jit
def store_part(partial, tops, totals, top, total, result, row, inside, DV, BLOCK_DV: tl.constexpr):
    """Write what rows get from one part of the tokens, for `_join_kernel`."""
    dv = tl.arange(0, BLOCK_DV)
    tl.store(tops + row, top, mask=inside)
    tl.store(totals + row, total, mask=inside)
    tl.store(partial + row[:, None] * DV + dv[None, :], result, mask=inside[:, None] & (dv < DV)[None, :])


@triton.jit
def _decode_kernel(
    q, keys, values, positions, mask, partial, tops, totals, held, P, prompt_length, length, part, m, scale, softcap,
    hidden_below, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, D, DV,
    KV_HEADS: tl.constexpr, FACTOR: tl.constexpr, GROUPS: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr,
    ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of (head, new token) rows over one part of the cached keys."""
    split = tl.program_id(0)
    if HELD:  # a number that only the device knows
        length = tl.load(held).to(tl.int32)
        part = tl.cdiv(tl.cdiv(length, tl.num_programs(0)), BLOCK_N) * BLOCK_N
    of_head = tl.program_id(1).to(tl.int64)
    b, h = of_head // KV_HEADS, of_head % KV_HEADS
    r, inside, head, token = rows_of_tile(m, FACTOR, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    own = b * stride_qb + (h * FACTOR + head) * stride_qh + token * stride_qn
    tile = tl.load(q + own[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    keys += b * stride_kb + h * stride_kh
    values += b * stride_vb + h * stride_vh
    positions += (b * GROUPS + h * GROUPS // KV_HEADS) * P
    mask += b * stride_mb + h * FACTOR * stride_mh
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = tl.minimum((split + 1) * part, length)
    for start in range(split * part, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        exists = column < end
        wide = column.to(tl.int64)
        k = tl.load(keys + wide[None, :] * stride_kn + d[:, None], mask=exists[None, :] & (d < D)[:, None], other=0.0)
        scores = capped(dot(tile, k), scale, softcap, CAPPED)  # [BLOCK_M, BLOCK_N]
        pointers = mask
        if MASK != 0:  # the mask knows tokens by where they stand in the sequence
            kept = tl.load(positions + column, mask=column < P, other=0)
            where = tl.where(column < P, kept, wide - P + prompt_length)
            if HELD:  # a bucket may have more rows than the mask has columns
                where = tl.minimum(where, prompt_length - 1)
            pointers = mask + mask_offsets(where, head, token, stride_mh, stride_mq, stride_mk, ROW)
        scores = masked(scores, exists[None, :] & inside[:, None], exists, pointers, hidden_below, MASK, ROW)
        v = tl.load(
            values + wide[:, None] * stride_vn + dv[None, :], mask=exists[:, None] & (dv < DV)[None, :], other=0.0
        )
        top, total, result = absorb(top, total, result, scores, v)
    row = (of_head * FACTOR * m + r) * SPLITS + split
    store_part(partial, tops, totals, top, total, result, row, inside, DV, BLOCK_DV)


@triton.jit
def _join_kernel(
    partial, tops, totals, out, splits, m, stride_ob, stride_oh, stride_on, DV,
    HEADS: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the parts of one (sample, head, new token) row."""
    row = tl.program_id(0).to(tl.int64)
    split, dv = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DV)
    used = split < splits
    top = tl.load(tops + row * SPLITS + split, mask=used, other=float("-inf"))
    best = tl.max(top, 0)
    weights = tl.exp2(top - tl.where(best == float("-inf"), 0.0, best))  # [SPLITS]
    total = tl.sum(tl.load(totals + row * SPLITS + split, mask=used, other=0.0) * weights, 0)
    parts = tl.load(
        partial + (row * SPLITS + split)[:, None] * DV + dv[None, :],
        mask=used[:, None] & (dv < DV)[None, :], other=0.0,
    )  # fmt: skip
    result = tl.sum(parts * weights[:, None], 0) * tl.where(total > 0, 1.0 / total, 0.0)
    token, head = row % m, row // m
    pointers = out + head // HEADS * stride_ob + head % HEADS * stride_oh + token * stride_on + dv
    tl.store(pointers, result.to(out.dtype.element_ty), mask=dv < DV)


class Parts:
    """What the parts of the keys give each new token, until they are joined.

    Args:
        q, keys, values: as decode_attention takes them.
        sources: how many launches write parts, each at most `MAX_SPLITS / sources`.

    Attributes:
        tiling: sizes of tiles, arguments of the kernels.
        splits: how many parts a launch has.
        written: the arrays of weighted values, maxima and sums, arguments of the kernels.
    """

    def __init__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sources: int = 1):
        (batch, heads, m, width), kv_heads, width_v = q.shape, keys.shape[1], values.shape[3]
        block_d, block_dv = tiles.head_blocks(width), tiles.head_blocks(width_v)
        row_bytes = max(block_d, block_dv) * q.element_size()
        block_n = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
        self.tiling = {"BLOCK_M": 16, "BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
        blocks = (heads // kv_heads * m + 15) // 16
        self.sources = sources
        self.splits = torch.sym_min(torch.sym_max(PROGRAMS // (batch * kv_heads * blocks), 1), MAX_SPLITS // sources)
        self.grid = (self.splits, batch * kv_heads, blocks)
        rows = batch * heads * m
        tops, totals = (q.new_empty(rows, MAX_SPLITS, dtype=torch.float32) for _ in range(2))
        self.written = {
            "partial": q.new_empty(rows, MAX_SPLITS, width_v, dtype=torch.float32), "tops": tops, "totals": totals,
        }  # fmt: skip

    def tokens(self, length: int) -> int:
        """Return how many of so many tokens a part has: whole tiles."""
        block = self.tiling["BLOCK_N"]
        return ((length + self.splits - 1) // self.splits + block - 1) // block * block

    def common(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None,
        scale: float | None, softcap: float | None,
    ) -> dict:  # fmt: skip
        """Return the arguments that kernels which write parts have in common."""
        width = q.shape[3]
        return self.written | self.tiling | tiles.strides(q=q) | tiles.mask_arguments(mask, q) | {
            "m": q.shape[2], "scale": width**-0.5 if scale is None else scale, "softcap": softcap or 0.0,
            "CAPPED": softcap is not None, "D": width, "DV": values.shape[3], "KV_HEADS": keys.shape[1],
            "FACTOR": q.shape[1] // keys.shape[1], "SPLITS": MAX_SPLITS, "num_warps": 4,
            "num_stages": tiles.pipelined(3),
        }  # fmt: skip

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int,
        n: int, mask: torch.Tensor | None, scale: float | None, softcap: float | None, held: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Write the first parts: those of the tokens in the buffers."""
        length = cached_count(positions, prompt_length, n)  # all rows, where the device knows how many there are
        launchable(_decode_kernel, q)[self.grid](
            q, keys, values, positions.contiguous(), held=q if held is None else held, P=positions.shape[2],
            prompt_length=prompt_length, length=length, part=self.tokens(length), GROUPS=positions.shape[1],
            HELD=held is not None, **tiles.strides(k=keys, v=values),
            **self.common(q, keys, values, mask, scale, softcap),
        )  # fmt: skip

    def join(self, q: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return what all new tokens get from all parts, `[B, Hq, m, Dv]`, token-major in memory."""
        out = empty_output(q, values)
        batch, heads, m, _ = q.shape
        launchable(_join_kernel, q)[(batch * heads * m,)](
            out=out, splits=self.splits * self.sources, m=m, **self.written, **tiles.strides(o=out), DV=values.shape[3],
            HEADS=heads, BLOCK_DV=self.tiling["BLOCK_DV"], SPLITS=MAX_SPLITS, num_warps=4,
        )  # fmt: skip
        return out


@torch.library.triton_op("zipvl::decode_attention", mutates_args=())
def _decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    mask: torch.Tensor | None, scale: float | None, softcap: float | None, held: torch.Tensor | None = None,
    kernel_: str = "auto",
) -> torch.Tensor:  # fmt: skip
    triton_runs = use_triton("decode_attention", kernel_, q, keys, values)
    if not is_traced(q) and (triton_runs or held is not None):
        check(q, keys, values, positions, prompt_length, n, mask)
    if not triton_runs:
        inside = is_traced(q) and not q.is_cuda and softcap is None and has_known_sizes(keys, positions)
        if inside or held is not None:
            return decode_in_graph(q, keys, values, positions, prompt_length, n, mask, scale, softcap, held)
        arguments = (q, keys, values, positions, prompt_length, n, mask, scale, softcap)
        return torch.ops.zipvl.decode_attention_torch(*arguments)
    q, keys, values = (tiles.unit_stride(x) for x in (q, keys, values))
    parts = Parts(q, keys, values)
    parts.attend(q, keys, values, positions, prompt_length, n, mask, scale, softcap, held)
    return parts.join(q, values)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    prompt_length: int,
    n: int,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    held: torch.Tensor | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attend from new tokens to the compacted cache, whose last tokens they are.

    Args:
        q: queries of the new tokens `[B, Hq, m, D]`.
        keys, values: buffers `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`.
        positions: int64 `[B, G, P]` of the kept prompt tokens.
        prompt_length: in tokens.
        n: logical length in tokens; the buffers hold `P + n - prompt_length` of them.
        mask: over the logical length, bool or additive float, `[B or 1, Hq or 1, m or 1, n]`; None shows everything.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        held: int64 `[]` on the device, how many tokens the buffers hold; `positions` then says where each row of them
            stands, `[B, G, capacity]`, `n` is how many columns a mask has, and `prompt_length` is the same number.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, Hq, m, Dv]`, token-major in memory.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: ZipVL (arXiv 2410.08584), decoding over the compacted KV cache.
    """
    return torch.ops.zipvl.decode_attention(
        q, keys, values, positions, prompt_length, n, mask, scale, softcap, held, kernel
    )
