"""Argument checks that the operators share: each names the argument, what was expected and what came."""

from __future__ import annotations

import torch


def fail(operator: str, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raise the one form of error that every operator uses."""
    raise ValueError(f"zipvl::{operator}: {argument}: expected {expected}, got {got}. {remedy}")


def check_attention_inputs(operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
    """Check `q [B, Hq, m, D]`, `k [B, Hkv, n, D]` and, where given, `v [B, Hkv, n, Dv]`.

    Raises:
        ValueError: a wrong rank, batch, head count, head_dim, dtype or device.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is None:
            continue
        if tensor.dim() != 4:
            fail(operator, name, "a [batch, heads, tokens, head_dim] tensor", list(tensor.shape), "Reshape it.")
        if not tensor.is_floating_point():
            fail(operator, name, "a floating-point dtype", tensor.dtype, "Cast it to fp32, fp16 or bf16.")
        if tensor.shape[0] != q.shape[0]:
            fail(operator, name, f"batch {q.shape[0]}, like q", tensor.shape[0], "Expand it to q's batch.")
        if tensor.device != q.device:
            fail(operator, name, f"device {q.device}, like q", tensor.device, "Move both to one device.")
        if tensor.dtype != q.dtype:
            fail(operator, name, f"dtype {q.dtype}, like q", tensor.dtype, "Cast one of them.")
    if k.shape[3] != q.shape[3]:
        fail(operator, "k", f"head_dim {q.shape[3]}, like q", k.shape[3], "Scores need equal head_dim.")
    if q.shape[1] % k.shape[1] != 0:
        fail(operator, "k", f"a head count that divides q's {q.shape[1]}", k.shape[1], "Check the GQA factor.")
    if v is not None and (v.shape[1] != k.shape[1] or v.shape[2] != k.shape[2]):
        fail(operator, "v", f"heads and tokens {list(k.shape[1:3])}, like k", list(v.shape[1:3]), "Pair k with v.")


def check_positions(operator: str, positions: torch.Tensor, batch: int, heads: int) -> None:
    """Check `positions [B, G, P]`, int64, with `G` dividing the head count."""
    if positions.dim() != 3 or positions.dtype != torch.int64:
        fail(
            operator, "positions", "an int64 [batch, groups, kept] tensor",
            f"{positions.dtype} {list(positions.shape)}", "Pass what select_tokens returned.",
        )  # fmt: skip
    if positions.shape[0] != batch or heads % positions.shape[1] != 0:
        fail(
            operator, "positions", f"batch {batch} and a group count that divides {heads} heads",
            list(positions.shape), "Pass the positions of this batch.",
        )  # fmt: skip


def check_mask(operator: str, mask: torch.Tensor | None, q: torch.Tensor, queries: int, keys: int) -> None:
    """Check that `mask` is bool or float and broadcasts to `[B, Hq, queries, keys]` over batch, heads and queries."""
    if mask is None:
        return
    sizes = (q.shape[0], q.shape[1], queries)
    if mask.dim() != 4:
        fail(operator, "mask", "a [batch, heads, queries, keys] tensor", list(mask.shape), "Unsqueeze it.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        fail(operator, "mask", "bool (True = visible) or an additive float", mask.dtype, "Convert it.")
    ok = all(mask.shape[i] in (1, sizes[i]) for i in (0, 1, 2))
    if not ok or mask.shape[3] != keys:
        fail(
            operator, "mask", f"a shape that broadcasts to {[*sizes, keys]}", list(mask.shape),
            "Give one row, or one per query, and one column per key.",
        )  # fmt: skip


def per_head(positions: torch.Tensor, heads: int) -> torch.Tensor:
    """Expand positions `[B, G, P]` to `[B, heads, P]`: a group serves `heads / G` neighbouring heads."""
    if positions.shape[1] == heads:
        return positions
    if positions.shape[1] == 1:
        return positions.expand(-1, heads, -1)
    return positions.repeat_interleave(heads // positions.shape[1], dim=1)
