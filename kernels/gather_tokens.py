"""KV compaction: copy the kept tokens into a buffer of their own, with spare room for decoding.

    out[b, h, i] = x[b, h, positions[b, g(h), i]]        for i < P;  0 in the `spare` rows after that

The copy is what frees memory: nothing of the full-length tensor stays alive. `gather_kv` does it for keys and values in
one launch.

Source: ZipVL (arXiv 2410.08584), KV cache of important tokens only.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import check_positions, fail
from zipvl_compile.kernels.common.dispatch import launchable, use_triton
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.common.tiles import unit_stride
from zipvl_compile.kernels.common.token_copies import take_rows

ROWS = 32  # tokens that one program copies


@triton.jit
def _copy_rows(x, out, at, stride_n, rows, inside, valid, capacity, D, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    source = x + at[:, None] * stride_n + d[None, :]
    target = out + rows[:, None] * D + d[None, :]
    # A position outside the prompt gives NaN, which nobody overlooks.
    found = tl.load(source, mask=(inside & valid)[:, None] & (d < D)[None, :], other=float("nan"))
    tl.store(target, tl.where(inside[:, None], found, 0.0), mask=(rows < capacity)[:, None] & (d < D)[None, :])


@triton.jit
def _gather_kernel(
    k, v, keys, values, positions, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    n, P, capacity, D, DV,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = (tl.program_id(1) % HEADS).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < P
    group = h * GROUPS // HEADS
    at = tl.load(positions + (b * GROUPS + group) * P + rows, mask=inside, other=0)  # [ROWS]
    valid = (at >= 0) & (at < n)
    first = tl.program_id(1).to(tl.int64) * capacity  # row of the head in the new buffers
    k += b * stride_kb + h * stride_kh
    _copy_rows(k, keys + first * D, at, stride_kn, rows, inside, valid, capacity, D, BLOCK_D)
    if BLOCK_DV > 0:
        v += b * stride_vb + h * stride_vh
        _copy_rows(v, values + first * DV, at, stride_vn, rows, inside, valid, capacity, DV, BLOCK_DV)


def _gather_triton(
    k: torch.Tensor, v: torch.Tensor | None, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None
) -> None:
    k, positions = unit_stride(k), positions.contiguous()
    v = None if v is None else unit_stride(v)
    batch, heads, n, width = k.shape
    p = positions.shape[2]
    of_v, width_v = (k, 0) if v is None else (v, v.shape[3])
    launchable(_gather_kernel, k)[(triton.cdiv(keys.shape[2], ROWS), batch * heads)](
        k, of_v, keys, keys if values is None else values, positions, *k.stride()[:3], *of_v.stride()[:3],
        n, p, keys.shape[2], width, width_v,
        HEADS=heads, GROUPS=positions.shape[1], BLOCK_D=triton.next_power_of_2(width),
        BLOCK_DV=triton.next_power_of_2(width_v) if width_v else 0, ROWS=ROWS, num_warps=4,
    )  # fmt: skip


def _gather_torch(x: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
    p = positions.shape[2]
    take_rows(x, positions, out[:, :, :p])
    out[:, :, p:] = 0


@torch.library.custom_op("zipvl::gather_tokens", mutates_args=())
def _gather_tokens(x: torch.Tensor, positions: torch.Tensor, spare: int, kernel_: str = "auto") -> torch.Tensor:
    _check("x", x, positions)
    out = _buffer(x, positions, spare)
    if out.numel() and use_triton("gather_tokens", kernel_, x):
        _gather_triton(x, None, positions, out, None)
    else:
        _gather_torch(x, positions, out)
    return out


@torch.library.custom_op("zipvl::gather_kv", mutates_args=())
def _gather_kv(
    k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, spare: int, kernel_: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    _check("k", k, positions)
    _check("v", v, positions)
    if v.shape[:3] != k.shape[:3]:
        fail("gather_kv", "v", f"batch, heads and tokens {list(k.shape[:3])}, like k", list(v.shape), "Pair k with v.")
    keys, values = _buffer(k, positions, spare), _buffer(v, positions, spare)
    if keys.numel() and values.numel() and use_triton("gather_kv", kernel_, k, v):
        _gather_triton(k, v, positions, keys, values)
    else:
        _gather_torch(k, positions, keys)
        _gather_torch(v, positions, values)
    return keys, values


def _check(name: str, x: torch.Tensor, positions: torch.Tensor) -> None:
    if x.dim() != 4:
        fail("gather_tokens", name, "a [batch, heads, tokens, head_dim] tensor", list(x.shape), "Reshape it.")
    check_positions("gather_tokens", positions, x.shape[0], x.shape[1])


def _buffer(x: torch.Tensor, positions: torch.Tensor, spare: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1], positions.shape[2] + spare, x.shape[3])


@_gather_tokens.register_fake
def _(x, positions, spare, kernel_="auto"):
    return _buffer(x, positions, spare)


@_gather_kv.register_fake
def _(k, v, positions, spare, kernel_="auto"):
    return _buffer(k, positions, spare), _buffer(v, positions, spare)


def gather_tokens(x: torch.Tensor, positions: torch.Tensor, spare: int = 0, kernel: str = "auto") -> torch.Tensor:
    """Copy the tokens at `positions` into a new contiguous buffer.

    Args:
        x: keys or values `[B, H, n, D]`.
        positions: int64 `[B, G, P]`, each in [0, n); `G` divides `H`.
        spare: rows of zeros after the kept ones, in tokens.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, H, P + spare, D]`, same dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit. RuntimeError: a position outside [0, n).
    """
    return torch.ops.zipvl.gather_tokens(x, positions, spare, kernel)


def gather_kv(
    k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, spare: int = 0, kernel: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do `gather_tokens` for keys `[B, H, n, D]` and values `[B, H, n, Dv]` at once, in one launch."""
    return torch.ops.zipvl.gather_kv(k, v, positions, spare, kernel)
