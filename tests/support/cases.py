"""Inputs, masks and tolerances that the operator tests share."""

from __future__ import annotations

import torch

# A result may be twice as far from the float64 model as plain PyTorch in the same dtype, plus this floor: about one
# unit in the last place of numbers near 1, because plain PyTorch is sometimes right by luck.
FLOOR = {torch.float64: 4e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HEADS = {"mha": (2, 2), "gqa4": (8, 2), "gqa7": (14, 2), "mqa": (4, 1)}
MASKS = (
    "none",
    "left-padding",
    "right-padding",
    "additive-min",
    "additive-inf",
    "per-head-window",
    "per-head-bias",
    "prefix",
)


def qkv(batch=1, heads="gqa4", n=63, dim=16, value_dim=None, dtype=torch.float64, seed=0, peak=2.5):
    """Return q, k, v with attention peaked enough that a few tokens hold most of it."""
    query_heads, kv_heads = HEADS[heads] if isinstance(heads, str) else heads
    generator = torch.Generator().manual_seed(seed)

    def draw(h, d, factor):
        x = torch.randn(batch, h, n, d, generator=generator, dtype=torch.float64)
        return (x * factor).to(dtype)

    return draw(query_heads, dim, peak), draw(kv_heads, dim, 1.0), draw(kv_heads, value_dim or dim, 1.0)


def padding(batch: int, n: int, side: str) -> torch.Tensor:
    """Return which tokens are real, bool `[batch, n]`: the first sample has no padding, the others ever more."""
    real = torch.ones(batch, n, dtype=torch.bool)
    for b in range(1, batch):
        pad = min(b * n // (batch + 1) + 1, n - 1)
        real[b, slice(0, pad) if side == "left" else slice(n - pad, n)] = False
    return real


def mask(name: str, batch: int, heads: int, n: int, dtype=torch.float64) -> torch.Tensor | None:
    """Return the mask of that name; all but "none" and "per-head-window" are causal by themselves."""
    causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    if name == "none":
        return None
    if name.endswith("padding"):
        return causal & padding(batch, n, name.split("-")[0])[:, None, None]
    if name == "prefix":  # the first third sees itself in both directions
        return causal | (torch.arange(n) < n // 3)[None, None, None]
    if name == "per-head-window":  # every head its own window, both directions
        far = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        return torch.stack([far <= 3 + 5 * h for h in range(heads)])[None]
    hidden = float("-inf") if name == "additive-inf" else torch.finfo(dtype).min
    shown = causal & padding(batch, n, "left")[:, None, None]
    additive = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, hidden)
    if name == "per-head-bias":  # ALiBi
        slopes = 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float64)
        distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        bias = -(slopes[:, None, None] * distance).to(dtype)[None]
        return torch.where(causal, bias, torch.full_like(bias, hidden))
    return additive


def choose(batch: int, groups: int, n: int, p: int, seed: int = 0, newest: bool = False) -> torch.Tensor:
    """Return p ascending positions of n tokens, int64 `[batch, groups, p]`, the last always among them if `newest`."""
    draw = torch.rand(batch, groups, n, generator=torch.Generator().manual_seed(seed))
    if newest:
        draw[..., -1] = -1
    return draw.argsort(-1)[..., :p].sort(-1).values


def plain_weights(q, k, mask=None, is_causal=True, scale=None):
    """Return softmax attention weights `[B, Hq, m, n]` in the dtype of `q`, in plain PyTorch."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        shown = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~shown, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1).nan_to_num(0.0)


def plain_attention(q, k, v, mask=None, is_causal=True, scale=None):
    """Return dense attention `[B, Hq, m, Dv]` in the dtype of `q`, in plain PyTorch."""
    return plain_weights(q, k, mask, is_causal, scale) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def assert_as_accurate(result, plain, exact, where=None, unit: float = 1.0) -> None:
    """Check that `result` is at most twice as far from `exact` as `plain` is, plus the floor of its dtype.

    Args:
        where: compare only there (bool, broadcasts).
        unit: size of the numbers, for the floor.
    """
    exact = torch.as_tensor(exact)
    assert result.shape == plain.shape == exact.shape
    assert result.dtype == plain.dtype
    error, allowed = (result.double() - exact).abs(), (plain.double() - exact).abs()
    if where is not None:
        where = where.expand_as(error)
        error, allowed = error[where], allowed[where]
    if error.numel() == 0:
        return
    bound = 2 * allowed.max() + FLOOR[result.dtype] * max(unit, 1.0)
    assert error.max() <= bound, f"error {error.max():.3g}, allowed {bound:.3g}"
