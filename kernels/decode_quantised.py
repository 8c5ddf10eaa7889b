"""Attention of new tokens over a cache that holds every prompt token: some in full, the others in few bits.

    keys = [K[T]; later keys; scale * code + zero],     the i-th of the last ones at logical position  other_tokens(T)_i
    o = softmax(cap(scale * q . keys^T) + mask[:, positions]) values

All queries come after the prompt, so the others hide from none of them. On a GPU the parts of both are joined by one
kernel; on a CPU one new token takes products with the codes themselves.

Source: ZipVL (arXiv 2410.08584), a KV cache whose less important tokens are quantised to fewer bits.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.dispatch import has_known_sizes, is_traced, use_triton
from zipvl_compile.kernels.decode_quantised_torch import check, decode_in_graph
from zipvl_compile.kernels.decode_quantised_triton import decode_triton


@torch.library.triton_op("zipvl::decode_quantised", mutates_args=())
def _decode_quantised(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int,
    key_codes: torch.Tensor, key_scales: torch.Tensor, value_codes: torch.Tensor, value_scales: torch.Tensor,
    mask: torch.Tensor | None, scale: float | None, softcap: float | None, kernel_: str = "auto",
) -> torch.Tensor:  # fmt: skip
    coded = key_codes, key_scales, value_codes, value_scales
    given = (q, keys, values, positions, prompt_length, n, *coded, mask, scale)
    if use_triton("decode_quantised", kernel_, q, keys, values):
        if not is_traced(q):
            check(q, keys, values, positions, prompt_length, n, *coded, mask)
        return decode_triton(*given, softcap)
    inside = is_traced(q) and not q.is_cuda and softcap is None and has_known_sizes(keys, positions, key_codes)
    one = isinstance(q.shape[2], int) and q.shape[2] == 1
    if inside and one and q.shape[3] == values.shape[3]:  # Inductor fails to pad a cache of lengths it does not know
        return decode_in_graph(*given)
    return torch.ops.zipvl.decode_quantised_torch(*given, softcap)


def decode_quantised(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    prompt_length: int,
    n: int,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attend from new tokens to the compacted cache, whose last tokens they are, and to the quantised prompt tokens.

    Args:
        q: queries of the new tokens `[B, Hq, m, D]`.
        keys, values: buffers `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`.
        positions: int64 `[B, G, P]` of the kept prompt tokens, ascending.
        prompt_length: in tokens; the `prompt_length - P` others are quantised.
        n: logical length in tokens; the buffers hold `P + n - prompt_length` of them.
        key_codes, key_scales: of the others, as `quantise_tokens` returns them by channel.
        value_codes, value_scales: of the others, as `quantise_tokens` returns them by token.
        mask: over the logical length, bool or additive float, `[B or 1, Hq or 1, m or 1, n]`; None shows everything.
        scale: of the scores; None is `D ** -0.5`.
        softcap: of the scaled scores; None is none.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        `[B, Hq, m, Dv]`, token-major in memory.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    return torch.ops.zipvl.decode_quantised(
        q, keys, values, positions, prompt_length, n, key_codes, key_scales, value_codes, value_scales, mask, scale,
        softcap, kernel,
    )  # fmt: skip
