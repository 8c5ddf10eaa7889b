"""How much attention every token gets, measured on a few probe rows.

    A[b,h,i,j] = softmax_j(cap(scale * q[b,h,i] . k[b,h,j]) + mask[b,h,i,j])   for i in the probe rows R
    accumulated[b,g,j] = mean_{h in g} sum_{i in R} A[b,h,i,j]                 sums to the valid probe rows
    visible[b,j]       = number of rows in R that may see token j              (nnz in the paper)

`cap` is the softcap of Gemma 2, `c * tanh(s / c)`, where the model has one.

R is the `recent` newest rows and `random` rows drawn, seeded, from the others. `accumulated / visible` is the
normalised score, which does not favour old tokens only because more rows can see them.

Source: ZipVL (arXiv 2410.08584), probe tokens and accumulated / normalised attention scores.
"""

from __future__ import annotations

import functools

import torch

from zipvl_compile.kernels.checks import check_attention_inputs, check_mask, fail
from zipvl_compile.kernels.dense_attention import soft_capped
from zipvl_compile.kernels.masks import causal, visible


@functools.lru_cache(maxsize=512)
def _probe_rows(n: int, recent: int, random: int, seed: int) -> torch.Tensor:
    if n <= recent + random:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(n - recent, generator=generator)[:random].sort().values
    return torch.cat([drawn, torch.arange(n - recent, n)])


def probe_rows(n: int, recent: int, random: int, seed: int) -> torch.Tensor:
    """Return the probe rows of an `n`-token prompt: int64 `[m]`, ascending, `m = min(n, recent + random)`.

    Args:
        n: prompt length in tokens.
        recent: newest rows that are always probes.
        random: rows drawn without replacement from the rest.
        seed: of the draw; equal arguments give equal rows, on every device.
    """
    return _probe_rows(n, recent, random, seed).clone()


@torch.library.custom_op("zipvl::probe_positions", mutates_args=())
def _probe_positions(k: torch.Tensor, recent: int, random: int, seed: int) -> torch.Tensor:
    return probe_rows(k.shape[2], recent, random, seed).to(k.device)


@_probe_positions.register_fake
def _(k, recent, random, seed):
    return k.new_empty(torch.sym_min(k.shape[2], recent + random), dtype=torch.int64)


@torch.library.custom_op("zipvl::token_scores", mutates_args=())
def _token_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    recent: int,
    random: int,
    seed: int,
    groups: int,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    check_attention_inputs("token_scores", q, k, None)
    batch, query_heads, given, _ = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    check_mask("token_scores", mask, q, n, n)
    rows = _probe_rows(n, recent, random, seed)  # [m]
    if given not in (n, rows.numel()):
        fail(
            "token_scores", "q", f"{n} tokens, like k, or the {rows.numel()} probe rows", given,
            "Only a prefill of a whole prompt is scored.",
        )  # fmt: skip
    if kv_heads % groups != 0:
        fail("token_scores", "groups", f"a divisor of {kv_heads} KV heads", groups, "Use 1 or the KV head count.")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    accumulated = torch.zeros(batch, groups, n, dtype=dtype, device=q.device)
    seen = torch.zeros(batch, n, dtype=dtype, device=q.device)
    if batch == 0 or n == 0:
        return accumulated, seen

    rows = rows.to(q.device)
    if given == n:
        q = q.index_select(2, rows)  # [B, Hq, m, D]
    columns = torch.arange(n, device=q.device)
    may_see = causal(rows, columns)[None, None] if is_causal else None  # [1, 1, m, n]
    bias = None
    if mask is not None:
        several = mask.shape[2] > 1
        mask = mask.index_select(2, rows) if several else mask.expand(-1, -1, rows.numel(), -1)
        shown = visible(mask)
        may_see = shown if may_see is None else shown & may_see
        bias = mask.to(dtype) if mask.is_floating_point() else None
    if may_see is None:
        seen += rows.numel()
    else:
        # With a mask per head, a row counts once if any head lets it see the token.
        seen += may_see.any(1).sum(1).to(dtype)

    factor = query_heads // kv_heads
    per_group = query_heads // groups  # heads that one group averages
    for head in range(kv_heads):  # one KV head at a time: bounded memory, K is read once
        heads = slice(head * factor, (head + 1) * factor)
        probes = q[:, heads].to(dtype) * scale  # [B, factor, m, D]
        scores = probes @ k[:, head, None].to(dtype).transpose(-1, -2)  # [B, factor, m, n]
        scores = soft_capped(scores, softcap)
        if bias is not None:
            scores += bias if bias.shape[1] == 1 else bias[:, heads]
        if may_see is not None:
            shown = may_see if may_see.shape[1] == 1 else may_see[:, heads]
            scores.masked_fill_(~shown, float("-inf"))
            # A row that sees nothing is padding: it gives no score and does not count.
            weights = torch.softmax(scores, -1).masked_fill_(~shown.any(-1, keepdim=True), 0.0)
        else:
            weights = torch.softmax(scores, -1)
        accumulated[:, head * groups // kv_heads] += weights.sum((1, 2)) / per_group
    return accumulated, seen


@_token_scores.register_fake
def _(q, k, mask, is_causal, scale, softcap, recent, random, seed, groups, kernel="auto"):
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
        recent, random, seed: the probe rows, see `probe_rows`.
        groups: 1 averages all heads, `Hkv` keeps a score per KV head.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        accumulated `[B, groups, n]` and visible `[B, n]` (probe rows that may see the token), fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: ZipVL (arXiv 2410.08584), accumulated and normalised attention scores on probe tokens.
    """
    return torch.ops.zipvl.token_scores(q, k, mask, is_causal, scale, softcap, recent, random, seed, groups, kernel)
