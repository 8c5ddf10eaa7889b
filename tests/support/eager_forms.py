"""Attention written out around a softmax, in the forms that models use, and near misses that are something else."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def llama(q, k, v, mask, scale, softcap):
    """As in transformers' eager functions."""
    weights = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    if mask is not None:
        weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float64).to(q.dtype)
    weights = F.dropout(weights, p=0.5, training=False)
    return torch.matmul(weights, v)


def git(q, k, v, mask, scale, softcap):
    weights = torch.matmul(q, k.transpose(-1, -2)) / (1 / scale)
    if softcap is not None:
        weights = softcap * (weights / softcap).tanh()
    return (weights if mask is None else mask + weights).softmax(-1) @ v


def in_place(q, k, v, mask, scale, softcap):
    weights = q @ k.mT
    weights = weights.mul(scale)
    if softcap is not None:
        weights = weights.div(softcap).tanh().mul(softcap)
    if mask is not None:
        weights += mask
    return torch.softmax(weights, 3).type_as(q).matmul(v)


def filled(q, k, v, mask, scale, softcap):
    """`masked_fill` with what is hidden, which is True there."""
    weights = (q * scale) @ k.permute(0, 1, 3, 2)
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = weights if mask is None else weights.masked_fill(mask < 0, float("-inf"))
    return torch.softmax(weights, -1) @ v


def where(q, k, v, mask, scale, softcap):
    weights = torch.matmul(q, k.transpose(3, 2)) * scale
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = (
        weights
        if mask is None
        else torch.where(mask >= 0, weights, torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype))
    )
    return torch.softmax(weights.float().double(), dim=-1).to(v.dtype) @ v


def einsum(q, k, v, mask, scale, softcap):
    weights = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = weights if mask is None else weights + mask
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(weights, -1), v)


def merged(q, k, v, mask, scale, softcap):
    """Batch and heads as one axis, `bmm`; the result is given its heads back."""
    batch, heads, n, _ = q.shape
    q3, k3, v3 = (x.reshape(batch * heads, x.shape[2], x.shape[3]) for x in (q, k, v))
    weights = torch.bmm(q3, k3.transpose(1, 2)) * scale
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = weights if mask is None else weights + mask[0]
    return torch.bmm(torch.softmax(weights, 2), v3).view(batch, heads, n, -1)


def baddbmm(q, k, v, mask, scale, softcap):
    batch, heads, n, _ = q.shape
    q3, k3, v3 = (x.reshape(batch * heads, x.shape[2], x.shape[3]) for x in (q, k, v))
    if mask is None:
        weights = torch.baddbmm(q3.new_zeros(1, n, n), q3, k3.transpose(1, 2), beta=0, alpha=scale)
    else:
        weights = torch.baddbmm(mask[0], q3, k3.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(weights, -1), v3).view(batch, heads, n, -1)


FORMS = (llama, git, in_place, filled, where, einsum, merged, baddbmm)
ONE_MASK = (merged, baddbmm)  # the mask is shared by the whole batch


# ---- near misses: (function, what the first difference must say)


def other_token_axis(q, k, v, mask, scale, softcap):
    """Attends over features: softmax(q^T k) is `[D, D]`."""
    return (torch.softmax(q.transpose(-1, -2) @ k * scale, -1) @ v.transpose(-1, -2)).transpose(-1, -2)


def softmax_over_queries(q, k, v, mask, scale, softcap):
    return torch.softmax(q @ k.transpose(-1, -2) * scale + mask, -2) @ v


def sinks(q, k, v, mask, scale, softcap):
    weights = q @ k.transpose(-1, -2) * scale + mask
    weights = torch.cat([weights, weights.new_zeros(*weights.shape[:3], 1)], -1)
    return torch.softmax(weights, -1)[..., :-1] @ v


def head_mask(q, k, v, mask, scale, softcap):
    return (torch.softmax(q @ k.transpose(-1, -2) * scale + mask, -1) * 0.5) @ v


def weights_returned(q, k, v, mask, scale, softcap):
    weights = torch.softmax(q @ k.transpose(-1, -2) * scale + mask, -1)
    return weights @ v + weights.sum()


def router(q, k, v, mask, scale, softcap):
    """A mixture of experts: a softmax, and no attention."""
    gates = torch.softmax(q @ k[:, :, :3].transpose(-1, -2), -1)
    return gates.max(-1, keepdim=True).values * v


def scaled_after_mask(q, k, v, mask, scale, softcap):
    return torch.softmax((q @ k.transpose(-1, -2) + mask) * scale, -1) @ v


def two_biases(q, k, v, mask, scale, softcap):
    bias = torch.arange(k.shape[2], dtype=q.dtype)
    return torch.softmax(q @ k.transpose(-1, -2) * scale + bias + mask, -1) @ v


def soft_hidden(q, k, v, mask, scale, softcap):
    return torch.softmax((q @ k.transpose(-1, -2) * scale).masked_fill(mask < 0, -1.0), -1) @ v


def odd_cap(q, k, v, mask, scale, softcap):
    return torch.softmax(torch.tanh(q @ k.transpose(-1, -2) * scale / 3.0) * 2.0 + mask, -1) @ v


def per_key_scale(q, k, v, mask, scale, softcap):
    return torch.softmax(q @ k.transpose(-1, -2) * k.norm(dim=-1)[:, :, None] + mask, -1) @ v


def other_einsum(q, k, v, mask, scale, softcap):
    return torch.softmax(torch.einsum("bhid,bhjd->bhji", q, k) * scale + mask, -1) @ v


def random_bias(q, k, v, mask, scale, softcap):
    weights = q @ k.transpose(-1, -2)
    return torch.softmax(weights / (1.0 + math.pi * weights.abs()) + mask, -1) @ v


NEAR_MISSES = {
    other_token_axis: "the keys are not transposed right before the product",
    softmax_over_queries: "",  # not even near: a softmax over another axis than the keys
    sinks: "the attention weights go through 'getitem' before the values",
    head_mask: "the attention weights go through 'mul' before the values",
    weights_returned: "the attention weights are read 2 times, not once",
    router: "the attention weights go through 'max' before the values",
    scaled_after_mask: "the mask is added before the scores are scaled",
    two_biases: "two terms are added to the scores",
    soft_hidden: "hidden scores are filled with -1.0, not with -inf",
    odd_cap: "tanh of the scores is not a softcap c * tanh(scores / c)",
    per_key_scale: "the scores are multiplied by a tensor",
    other_einsum: "einsum 'bhid,bhjd->bhji' is not 'bhqd,bhkd->bhqk'",
    random_bias: "the scores are multiplied by a tensor",
}
