"""A flash attention for CPUs, in the place of the libraries that transformers would load: one opaque operator.

What calls it is transformers' own `flash_attention_forward`: with its transposes, its look at packed sequences, which
breaks the graph of a single sample, and its unpadding, which breaks that of padded ones.
"""

from __future__ import annotations

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

NAME = "fake_flash_attention"
OPERATOR = "fake_flash::fwd"


@torch.library.custom_op(OPERATOR, mutates_args=())
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    m, n = q.shape[2], k.shape[2]
    mask = torch.ones(m, n, dtype=torch.bool).tril(n - m) if causal else None
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@_forward.register_fake
def _(q, k, v, scale, causal):
    return q.new_empty(*q.shape[:3], v.shape[3])


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """As that of flash_attn: `q, k, v [B, n, H, D]`."""
    return _forward(q, k, v, softmax_scale or q.shape[-1] ** -0.5, causal)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
    """As that of flash_attn: the samples of `q, k, v [tokens, H, D]` lie one behind the other."""
    starts, ends = ([x.tolist() for x in (c[:-1], c[1:])] for c in (cu_seqlens_q, cu_seqlens_k))
    parts = zip(*starts, *ends, strict=True)
    return torch.cat([
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale=softmax_scale, causal=causal)[0]
        for a, b, c, d in parts
    ])  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch) -> str:
    """Have transformers offer the fake as an `attn_implementation`, loaded, and return its name."""
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, flash_attention_mask)
    loaded = {
        "_loaded_implementation": NAME, "_flash_fn": flash_attn_func, "_flash_varlen_fn": flash_attn_varlen_func,
        "_flash_with_kvcache_fn": None, "_pad_fn": flash._pad_input, "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }  # fmt: skip
    for name, value in loaded.items():
        monkeypatch.setattr(flash, name, value)
    return NAME
