"""Prefill attention among the kept tokens, and of every other token to its neighbourhood.

    local(i) = {j : i - window < j <= i}  and  {the first `sinks` visible tokens of the sample, j <= i}
    o[i]     = softmax over local(i)                              for i not in T
    o[i]     = softmax over {j in T, j <= i if is_causal}         for i in T; with kept_window, over local(i) too
                                                                  with queries="all", so does every i

`mask` hides keys of both kinds; a key counts once, whichever way it comes in. Which tokens are the first ones is told
by `visible`, so the padding of a sample does not change its answer. A row that sees nothing gets zeros.

The cost is n (window + sinks) + p^2, or n p where every row sees the kept tokens. On a GPU the kept rows are those of
sparse_attention, or of a kernel that goes over the kept keys and then over the local ones in one softmax, and a kernel
fills in the other rows.

Source: ZipVL (arXiv 2410.08584), sparse attention on important tokens; StreamingLLM (arXiv 2309.17453), a window and
attention sinks.
"""

from __future__ import annotations

import functools

import torch

from zipvl_compile.kernels.common import autotune
from zipvl_compile.kernels.common.checks import check_attention_inputs, check_mask, check_positions, fail
from zipvl_compile.kernels.common.dense_attention import dense_attention
from zipvl_compile.kernels.common.dispatch import use_triton
from zipvl_compile.kernels.every_row_torch import attend_every_row_torch
from zipvl_compile.kernels.sparse_attention_torch import empty_output
from zipvl_compile.kernels.window_attention_torch import attend_window_torch, first_visible
from zipvl_compile.kernels.window_attention_triton import attend_window_triton


@torch.library.custom_op("zipvl::window_attention", mutates_args=())
def _window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor, kept_v: torch.Tensor,
    positions: torch.Tensor, visible: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, window: int, sinks: int, kept_window: bool, queries: str, dense_from: float = 1.0,
    kernel_: str = "auto",
) -> torch.Tensor:  # fmt: skip
    if mask is not None and mask.shape[0] == 0:  # what hiding_rows gives for a mask that hides nothing
        mask = None
    _check(q, k, v, kept_k, kept_v, positions, visible, mask, window, sinks, kept_window, queries, dense_from)
    if q.numel() == 0 or v.numel() == 0:
        return empty_output(q, v).zero_()
    p, n = positions.shape[2], k.shape[2]
    if queries == "all" and mask is None and q.shape[2] == n and p >= dense_from * n:
        return empty_output(q, v).copy_(dense_attention(q, k, v, None, is_causal, scale, softcap))
    first = first_visible(visible, sinks)
    options, every = (is_causal, scale, softcap, window), queries == "all"
    plain = functools.partial(
        attend_every_row_torch if every else functools.partial(attend_window_torch, kept_window=kept_window),
        q, k, v, kept_k[:, :, :p], kept_v[:, :, :p], positions, first, mask, *options,
    )  # fmt: skip
    if not use_triton("window_attention", kernel_, q, k, v) or p == 0:
        return plain()
    kernels = functools.partial(
        attend_window_triton, q, k, v, kept_k, kept_v, positions, first, mask, *options, kept_window, every, kernel_
    )
    if kernel_ == "triton":
        return kernels()
    kind = None if mask is None else (mask.dtype, mask.shape[1] > 1, mask.shape[2] > 1)
    sizes = (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3], *map(autotune.bucket, (p, q.shape[2], window)))
    key = ("window_attention", q.device, q.dtype, sizes, kind, is_causal, softcap is None, kept_window, every)
    return autotune.run(key, {"triton": kernels, "torch": plain}, q.device)


@_window_attention.register_fake
def _(
    q, k, v, kept_k, kept_v, positions, visible, mask, is_causal, scale, softcap, window, sinks, kept_window, queries,
    dense_from=1.0, kernel_="auto",
):  # fmt: skip
    return empty_output(q, v)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor, kept_v: torch.Tensor,
    positions: torch.Tensor, visible: torch.Tensor, mask: torch.Tensor | None, window: int, sinks: int,
    kept_window: bool, queries: str, dense_from: float,
) -> None:  # fmt: skip
    operator = "window_attention"
    check_attention_inputs(operator, q, k, v)
    batch, n = k.shape[0], k.shape[2]
    if queries not in ("selected", "all"):
        fail(operator, "queries", '"selected" or "all"', repr(queries), 'Use "selected".')
    if queries == "all" and not kept_window:
        fail(operator, "kept_window", 'True, with queries="all"', kept_window, "Or use sparse_attention.")
    if q.shape[2] > n or (queries == "selected" and q.shape[2] < n):
        expected = f"{n} tokens, like k" + (", or the newest of them" if queries == "all" else "")
        fail(operator, "q", expected, q.shape[2], "Pass the queries of every token.")
    check_mask(operator, mask, q, n, n)
    check_positions(operator, positions, batch, k.shape[1])
    for name, kept, whole in (("kept_k", kept_k, k), ("kept_v", kept_v, v)):
        what = (*whole.shape[:2], *whole.shape[3:], whole.dtype, whole.device)
        if kept.dim() != 4 or (*kept.shape[:2], *kept.shape[3:], kept.dtype, kept.device) != what:
            expected = f"batch, heads, head_dim, dtype and device {[str(x) for x in what]}, like {name[-1]}"
            came = f"{list(kept.shape)} {kept.dtype} {kept.device}"
            fail(operator, name, expected, came, "Gather it with these positions.")
        if kept.shape[2] < positions.shape[2]:
            expected = f"at least {positions.shape[2]} kept tokens"
            fail(operator, name, expected, kept.shape[2], "Gather it with these positions.")
    if visible.shape != (batch, n) or visible.device != q.device:
        expected, came = f"a [{batch}, {n}] tensor on {q.device}", f"{list(visible.shape)} on {visible.device}"
        fail(operator, "visible", expected, came, "Pass what token_scores returned.")
    if window < 1:
        fail(operator, "window", "at least 1 token", window, "A token sees itself at least.")
    if sinks < 0:
        fail(operator, "sinks", "at least 0 tokens", sinks, "Use 0 for none.")
    if not 0 < dense_from <= 1:
        fail(operator, "dense_from", "a fraction in (0, 1]", dense_from, "Use 1.0 for never, unless all are kept.")


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept_k: torch.Tensor,
    kept_v: torch.Tensor,
    positions: torch.Tensor,
    visible: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    window: int = 64,
    sinks: int = 4,
    kept_window: bool = False,
    queries: str = "selected",
    dense_from: float = 1.0,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attend among the kept tokens, and from every other token to the tokens near it and to the first ones.

    Args:
        q: queries of every token `[B, Hq, n, D]`, with queries="all" those of the m newest suffice; fp16, bf16, fp32 or
            fp64.
        k, v: keys `[B, Hkv, n, D]` and values `[B, Hkv, n, Dv]` of every token; `Hkv` divides `Hq`.
        kept_k, kept_v: kept keys `[B, Hkv, >= P, D]` and values `[B, Hkv, >= P, Dv]`. Rows after the first `P` have no
            effect, but on a GPU those of `kept_v` must be finite, as what gather_tokens and with_room return.
        positions: int64 `[B, G, P]`, ascending, where the kept tokens stand in the prompt.
        visible: `[B, n]`, above zero for tokens that are no padding, as token_scores returns it.
        mask: over the whole prompt, bool or additive float, `[B or 1, Hq or 1, n or 1, n]`; one of 0 samples, which
            `hiding_rows` may return, hides nothing.
        is_causal: hide later kept tokens, in addition to `mask`; local tokens are never later ones.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        window: how many tokens, itself included, a token sees locally.
        sinks: how many of the first visible tokens of its sample a token sees besides.
        kept_window: whether kept tokens see their local tokens too, in one softmax.
        queries: "all" lets every token see what kept ones do, which takes kept_window=True.
        dense_from: with queries="all" and no mask, the fraction of kept tokens from which every token sees all before
            it, since leaving out the few others would take longer.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, Hq, n, Dv]`, as many rows as `q`, token-major in memory; a row that sees nothing is zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a window below 1, or sinks below 0.

    Source: ZipVL (arXiv 2410.08584), sparse attention on important tokens; StreamingLLM (arXiv 2309.17453), a window
    and attention sinks.
    """
    given = (q, k, v, kept_k, kept_v, positions, visible, mask, is_causal, scale, softcap)
    return torch.ops.zipvl.window_attention(*given, window, sinks, kept_window, queries, dense_from, kernel)
