"""sparse_attention in plain PyTorch: gather the kept queries, attend, put the results into their rows.

The attention is scaled_dot_product_attention, so on a GPU this is also how its vendor's kernels come in. cuDNN's is the
fastest on Hopper, but it builds a plan for every length that it meets, which takes tens of milliseconds, and with tau
every layer of every prompt has a length of its own. So lengths are rounded up, by a sixteenth at most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zipvl_compile.kernels.common.checks import per_head
from zipvl_compile.kernels.common.dense_attention import dense_attention
from zipvl_compile.kernels.common.masks import causal, take, visible
from zipvl_compile.kernels.common.token_copies import put_rows, take_rows


def empty_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Allocate `[B, Hq, n, Dv]` laid out token-major, as the models read it next: `transpose(1, 2)` is free."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in the layout of `empty_output`, which most backends of scaled_dot_product_attention give."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attend_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, scale: float | None, softcap: float | None, every_query: bool,
) -> torch.Tensor:  # fmt: skip
    """Attend as `sparse_attention` says; `every_query` says that `q` holds more than the kept tokens, all of them."""
    batch, heads, m, _ = q.shape
    p = positions.shape[2]
    # One group serves all heads unless each KV head keeps its own tokens.
    where = positions if positions.shape[1] == 1 else per_head(positions, heads)  # [B, 1 or Hq, P]
    if every_query:
        bias = None if mask is None else take(mask, batch, None, where)
        if is_causal:
            shown = causal(torch.arange(m, device=q.device), where)  # [B, 1 or Hq, n, P]
            bias = shown if bias is None else _hide(bias, shown)
        out = _laid_out(dense_attention(q, k, v, bias, False, scale, softcap))
        if bias is not None:  # a query that sees no kept key gets no attention output
            out.masked_fill_(~visible(bias).any(-1, keepdim=True), 0.0)
        return out

    kept_q = q if m == p else take_rows(q, positions, q.new_empty(batch, heads, p, q.shape[3]))
    bias = mask
    if mask is not None and p < mask.shape[3]:
        bias = take(mask, batch, where, where)
    if bias is not None and is_causal:
        bias = _hide(bias, torch.ones(p, p, dtype=torch.bool, device=q.device).tril())
    kept = dense_attention(kept_q, k, v, bias, is_causal and bias is None, scale, softcap)  # [B, Hq, P, Dv]
    return _laid_out(kept) if m == p else put_rows(kept, positions, empty_output(q, v).zero_())


def _hide(mask: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Return `mask` with everything outside `shown` hidden, in the form that `mask` has."""
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, float("-inf"))


def plan_length(p: int) -> int:
    """Return `p` rounded up to one of sixteen lengths an octave, in steps of at most 1024 (tokens).

    The step is at most the spare room of a cache, so that its buffers hold as many rows.
    """
    step = 1 << min(max(p.bit_length() - 5, 0), 10)
    return (p + step - 1) // step * step


def attend_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attend causally among the kept tokens by cuDNN. Later rows hide behind the causal mask, whatever `k` holds there.

    Args:
        q: `[B, Hq, n or P, D]`.
        k, v: `[B, Hkv, >= P, D]`, `[B, Hkv, >= P, Dv]`, with finite rows after the first `P`.
        positions: int64 `[B, G, P]`.
        scale: of the scores; None is `D ** -0.5`.
    """
    batch, heads, m, width = q.shape
    p = positions.shape[2]
    length = plan_length(p)
    k, v = (x[:, :, :length] if x.shape[2] >= length else F.pad(x[:, :, :p], (0, 0, 0, length - p)) for x in (k, v))
    queries = q
    if m != length:
        queries = q.new_empty(batch, length, heads, width).transpose(1, 2)
        if m == p:
            queries[:, :, :p] = q
        else:
            take_rows(q, positions, queries[:, :, :p])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        kept = F.scaled_dot_product_attention(
            queries, k, v, is_causal=True, scale=scale, enable_gqa=heads != k.shape[1]
        )[:, :, :p]
    return _laid_out(kept) if m == p else put_rows(kept, positions, empty_output(q, v).zero_())
