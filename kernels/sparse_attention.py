"""Prefill attention among the kept tokens only.

    o[b, h, T_i] = softmax(cap(scale * q[T_i] . K[T]^T) + mask[T_i, T]) V[T]      kept queries
    o[b, h, i]   = 0                                                             for i not in T   (queries="selected")

T is ascending, so a causal mask over kept tokens is again a plain causal mask and the work is dense attention
over p tokens. With `all_queries`, every query attends to the kept keys that it may see.

Source: ZipVL (arXiv 2410.08584), sparse attention on important tokens.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.checks import check_attention_inputs, check_mask, check_positions, fail, per_head
from zipvl_compile.kernels.dense_attention import dense_attention
from zipvl_compile.kernels.masks import causal, take, visible


def _empty_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Allocate `[B, Hq, n, Dv]` laid out token-major, as the models read it next: `transpose(1, 2)` is free."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


@torch.library.custom_op("zipvl::sparse_attention", mutates_args=())
def _sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    all_queries: bool,
    kernel: str = "auto",
) -> torch.Tensor:
    batch, heads, m, _ = q.shape
    check_positions("sparse_attention", positions, batch, k.shape[1])
    p = positions.shape[2]
    n = m if mask is None or m != p else mask.shape[-1]  # queries of the kept tokens only may come with a full mask
    if all_queries and m != n:
        fail("sparse_attention", "q", f"{n} tokens, like the mask", m, "Pass the queries of every token.")
    rows = min(k.shape[2], v.shape[2])
    if rows < p:
        fail("sparse_attention", "k, v", f"at least {p} kept tokens", rows, "Gather them with these positions.")
    k, v = k[:, :, :p], v[:, :, :p]
    check_attention_inputs("sparse_attention", q, k, v)
    check_mask("sparse_attention", mask, q, n, n)
    out = _empty_output(q, v)
    if out.numel() == 0:
        return out
    # One group serves all heads unless each KV head keeps its own tokens.
    where = positions if positions.shape[1] == 1 else per_head(positions, heads)  # [B, 1 or Hq, P]
    if all_queries and p < n:  # where every token is kept, this is the dense attention below
        bias = None if mask is None else take(mask, batch, None, where)
        if is_causal:
            shown = causal(torch.arange(n, device=q.device), where)  # [B, 1 or Hq, n, P]
            bias = shown if bias is None else _hide(bias, shown)
        out.copy_(dense_attention(q, k, v, bias, False, scale, softcap))
        if bias is not None:  # a query that sees no kept key gets no attention output
            out.masked_fill_(~visible(bias).any(-1, keepdim=True), 0.0)
        return out

    index = where.expand(-1, heads, -1).unsqueeze(3)  # [B, Hq, P, 1]
    kept_q = q if m == p else q.gather(2, index.expand(-1, -1, -1, q.shape[3]))  # [B, Hq, P, D]
    bias = mask
    if mask is not None and p < n:
        bias = take(mask, batch, where, where)
    if bias is not None and is_causal:
        bias = _hide(bias, torch.ones(p, p, dtype=torch.bool, device=q.device).tril())
    kept = dense_attention(kept_q, k, v, bias, is_causal and bias is None, scale, softcap)  # [B, Hq, P, Dv]
    if m == p:
        return out.copy_(kept)
    out.zero_()
    return out.scatter_(2, index.expand(-1, -1, -1, v.shape[3]), kept)


def _hide(mask: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Return `mask` with everything outside `shown` hidden, in the form that `mask` has."""
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, float("-inf"))


@_sparse_attention.register_fake
def _(q, k, v, positions, mask, is_causal, scale, softcap, all_queries, kernel="auto"):
    return _empty_output(q, v)


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
    all_queries: bool = False,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attend among the kept tokens and write the results to their rows.

    Args:
        q: queries of every token `[B, Hq, n, D]`, or of the kept ones only `[B, Hq, P, D]`.
        k, v: kept keys `[B, Hkv, >= P, D]` and values `[B, Hkv, >= P, Dv]`; only the first `P` rows are read.
        positions: int64 `[B, G, P]`, ascending, where the kept tokens stand in the prompt.
        mask: over the whole prompt, bool or additive float, `[B or 1, Hq or 1, n or 1, n]`.
        is_causal: hide later tokens, in addition to `mask`.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        all_queries: give every query, not only the kept ones, its attention output.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, Hq, n, Dv]`, token-major in memory; zero rows for tokens without attention output. `[B, Hq, P, Dv]` for
        the queries of the kept tokens only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: ZipVL (arXiv 2410.08584), sparse attention on important tokens.
    """
    return torch.ops.zipvl.sparse_attention(q, k, v, positions, mask, is_causal, scale, softcap, all_queries, kernel)
