"""Compare a kernel with the same operator in PyTorch: in float64 for the truth, in its own dtype for what is fair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.cases import assert_as_accurate, mask, qkv
from support.implementations import NARROW, Implementation

# name: batch, heads, n, p, head_dim, value head_dim, mask. Each size, width, GQA factor and mask at least once.
SHAPES = {
    "one-token": (1, "mha", 1, 1, 16, 16, "none"),
    "one-kept": (3, "gqa4", 63, 1, 60, 60, "left-padding"),
    "all-kept": (3, "gqa7", 63, 63, 16, 16, "left-padding"),
    "wide-values": (2, "gqa4", 130, 50, 20, 80, "none"),
    "narrow-values": (1, "mqa", 130, 129, 80, 24, "none"),
    "additive": (3, "gqa4", 63, 30, 80, 80, "additive-min"),
    "additive-inf": (2, "gqa7", 63, 20, 16, 16, "additive-inf"),
    "right-padding": (3, "mha", 63, 40, 16, 16, "right-padding"),
    "window": (1, "gqa4", 63, 30, 16, 16, "per-head-window"),
    "alibi": (2, "gqa4", 63, 30, 16, 16, "per-head-bias"),
    "prefix": (2, "mha", 63, 30, 60, 60, "prefix"),
    "n500": (3, "gqa7", 500, 180, 60, 60, "left-padding"),
    "n1025": (1, "gqa4", 1025, 400, 80, 80, "none"),
    "head-256": (1, "mqa", 63, 31, 256, 256, "none"),
}
LARGE = {  # batch, heads, n, head_dim, padded: for GPUs
    "4k": (1, (8, 8), 4096, 128, False),
    "4k-gqa": (2, (16, 4), 4096, 64, True),
    "9k-odd": (1, (4, 2), 9001, 80, False),
}
DTYPES = NARROW
KERNELS = ("triton", "auto", "torch")


def inputs(name: str, dtype: torch.dtype, seed: int = 0):
    """Return q, k, v, mask, whether it is causal besides, and p of a shape."""
    batch, heads, n, p, dim, value_dim, kind = SHAPES[name]
    q, k, v = qkv(batch=batch, heads=heads, n=n, dim=dim, value_dim=value_dim, dtype=dtype, seed=seed)
    return q, k, v, mask(kind, batch, q.shape[1], n, dtype), kind == "none", p


def padding_row(name: str) -> torch.Tensor | None:
    """Return the padding of a shape's mask as a row `[B, 1, 1, n]`, for a causal flag beside it."""
    batch, _, n, _, _, _, kind = SHAPES[name]
    return mask(kind, batch, 1, n)[:, :, -1:] if kind == "left-padding" else None


def exactly(x):
    """Return `x` in float64; an additive mask hides with -inf, whatever its dtype hid with."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x.double().masked_fill(x <= torch.finfo(x.dtype).min / 2, -torch.inf)


def compare(got, plain, exact, *, unit: float = 1.0, where=None, zeros: bool = True) -> None:
    """Assert that `got` errs at most twice as much as `plain`, PyTorch in the same dtype, plus the floor of the dtype.

    Args:
        where: rows to compare; a query that sees nothing has no defined result in PyTorch.
        zeros: the other rows must be zeros.
    """
    assert not got.isnan().any(), "not written, or not defined"
    if where is not None:
        if zeros:
            assert not got.masked_select((~where).expand_as(got)).any(), "a query that sees nothing gets zeros"
        got, plain, exact = (x.masked_fill(~where, 0) for x in (got, plain, exact))
    # The interpreter cuts bf16 and fp16 off instead of rounding them: one more unit in the last place.
    assert_as_accurate(got, plain, exact, unit=unit)


def check(
    implementation: Implementation, operator: Callable[..., torch.Tensor], *tensors, kernel: str = "triton",
    unit: float = 1.0, where=None, zeros: bool = True, **options,
) -> torch.Tensor:  # fmt: skip
    """Compare a kernel with PyTorch, see `compare`; return its result."""
    got = implementation.run(operator, *tensors, kernel=kernel, **options)
    exact = operator(*map(exactly, tensors), kernel="torch", **options)
    plain = implementation.run(operator, *tensors, kernel="torch", **options)
    compare(got, plain, exact, unit=unit, where=where, zeros=zeros)
    return got
