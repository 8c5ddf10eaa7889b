"""The append that precedes every decode step: new keys and values go into the spare rows of the cache, in place.

    keys[b, h, at + i] = k[b, h, i],      values[b, h, at + i] = v[b, h, i]

Nothing else of the cache is read or written. On a GPU this is one launch that Inductor compiles with the graph.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import fail
from zipvl_compile.kernels.common.dispatch import is_traced, launchable, use_triton
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.common.tiles import strides, unit_stride


@torch.library.custom_op("zipvl::append_tokens_torch", mutates_args=("keys", "values"))
def _append_torch(keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int) -> None:
    _check(keys, values, k, v, at)
    keys[:, :, at : at + k.shape[2]].copy_(k)
    values[:, :, at : at + k.shape[2]].copy_(v)


@_append_torch.register_fake
def _(keys, values, k, v, at):
    return None


def write_rows(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int | torch.Tensor
) -> None:
    """Write new tokens into buffers, in place, by operations that a compiler sees; `at` may be a tensor, int64 `[]`."""
    rows = at + torch.arange(k.shape[2], device=k.device)
    keys.index_copy_(2, rows, k)
    values.index_copy_(2, rows, v)


@triton.jit
def _append_kernel(
    keys, values, k, v, at, m, stride_Kb, stride_Kh, stride_Kn, stride_Vb, stride_Vh, stride_Vn,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DV,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    new_k = tl.load(k + b * stride_kb + h * stride_kh + i * stride_kn + d, mask=(i < m) & (d < D))
    new_v = tl.load(v + b * stride_vb + h * stride_vh + i * stride_vn + dv, mask=(i < m) & (dv < DV))
    tl.store(keys + b * stride_Kb + h * stride_Kh + (at + i) * stride_Kn + d, new_k, mask=(i < m) & (d < D))
    tl.store(values + b * stride_Vb + h * stride_Vh + (at + i) * stride_Vn + dv, new_v, mask=(i < m) & (dv < DV))


@torch.library.triton_op("zipvl::append_tokens", mutates_args=("keys", "values"))
def _append_tokens(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int, kernel_: str = "auto"
) -> None:
    if not (use_triton("append_tokens", kernel_, keys, values) and keys.stride(-1) == values.stride(-1) == 1):
        if is_traced(keys) and not keys.is_cuda:  # Inductor writes in place what it would call us for
            write_rows(keys, values, k, v, at)
            return
        torch.ops.zipvl.append_tokens_torch(keys, values, k, v, at)
        return
    if not is_traced(keys):
        _check(keys, values, k, v, at)
    k, v = unit_stride(k), unit_stride(v)
    batch, heads, m, width = k.shape
    block = 1 if isinstance(m, int) and m == 1 else 16
    launchable(_append_kernel, keys)[((m + block - 1) // block, batch * heads)](
        keys, values, k, v, at, m, **strides(K=keys, V=values, k=k, v=v), D=width, DV=v.shape[3], HEADS=heads,
        BLOCK_M=block, BLOCK_D=triton.next_power_of_2(width), BLOCK_DV=triton.next_power_of_2(v.shape[3]), num_warps=1,
    )  # fmt: skip


def _check(keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int) -> None:
    for name, buffer, new in (("k", keys, k), ("v", values, v)):
        expected = (*buffer.shape[:2], k.shape[2], buffer.shape[3])
        if tuple(new.shape) != expected or new.dtype != buffer.dtype:
            got = f"{new.dtype} {list(new.shape)}"
            fail("append_tokens", name, f"{buffer.dtype} {list(expected)}, like the buffer", got, "Check the cache.")
    end = at + k.shape[2]
    if at < 0:
        fail("append_tokens", "at", "a row of the buffer", at, "Count the cached tokens.")
    if end > keys.shape[2] or end > values.shape[2]:
        fail("append_tokens", "at", f"room for {end} tokens", keys.shape[2], "Grow the buffer first.")


def append_tokens(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int, kernel: str = "auto"
) -> None:
    """Write new tokens into the cache buffers, in place.

    Args:
        keys, values: buffers `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`.
        k, v: new tokens `[B, Hkv, m, D]` and `[B, Hkv, m, Dv]`.
        at: first row to write, in tokens.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Raises:
        ValueError: the buffers have no room; nothing was written then.
    """
    torch.ops.zipvl.append_tokens(keys, values, k, v, at, kernel)
