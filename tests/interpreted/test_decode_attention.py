"""The kernels of decode_attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare_kernels import DTYPES, check

from zipvl_compile.kernels import decode_attention as module
from zipvl_compile.kernels.common.masks import visible
from zipvl_compile.kernels.decode_attention import decode_attention

SHAPES = {  # batch, heads, kept, later tokens, new tokens, head_dim, value head_dim, mask
    "first-step": (1, "mha", 1, 1, 1, 16, 16, "none"),
    "gqa7": (3, "gqa7", 40, 5, 1, 60, 60, "padding"),
    "gqa4": (2, "gqa4", 500, 25, 1, 80, 80, "none"),
    "several-new": (3, "gqa7", 60, 9, 9, 16, 24, "padding"),
    "additive": (2, "gqa4", 60, 3, 2, 16, 16, "additive"),
    "per-head": (2, "mqa", 60, 3, 2, 16, 16, "per-head"),
    "head-256": (1, "mqa", 31, 2, 1, 256, 256, "none"),
}


def inputs(cases, shape, dtype, seed=0):
    """Return the arguments of decode_attention; the prompt is twice as long as what it kept, spare rows are NaN."""
    batch, heads, kept, later, m, dim, value_dim, kind = shape
    prompt = 2 * kept
    n = prompt + later
    _, k, v = cases.qkv(batch, heads, kept + later + 3, dim, value_dim, dtype, seed)
    k[:, :, kept + later :], v[:, :, kept + later :] = float("nan"), float("nan")
    q = cases.qkv(batch, heads, m, dim, dtype=dtype, seed=seed + 1)[0]
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(batch, 1, prompt, generator=generator).argsort(-1)[..., :kept].sort(-1).values
    shown = torch.rand(batch, q.shape[1] if kind == "per-head" else 1, m, n, generator=generator) > 0.3
    shown[..., -1] = True
    mask = None if kind == "none" else shown[:, :, :1] if kind == "padding" else shown
    if kind == "additive":
        mask = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)
    return q, k, v, positions, prompt, n, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(cases, shape, dtype):
    out = check(decode_attention, *inputs(cases, SHAPES[shape], dtype))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("programs", [1, 8, 10_000], ids=["one-part", "some-parts", "all-parts"])
def test_parts_join_to_the_same(cases, monkeypatch, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    check(decode_attention, *inputs(cases, SHAPES["gqa4"], torch.float32))


def test_softcap_and_scale(cases):
    check(decode_attention, *inputs(cases, SHAPES["additive"], torch.float32), scale=0.7, softcap=3.0)


def test_a_token_that_sees_nothing_gets_zeros(cases):
    arguments = list(inputs(cases, SHAPES["gqa7"], torch.float32))
    arguments[-1][1] = False
    out = check(decode_attention, *arguments, where=visible(arguments[-1]).any(-1, keepdim=True))
    assert not out[1].any() and out[0].any()


def test_keys_of_each_kv_head_stand_at_their_own_positions(cases):
    arguments = list(inputs(cases, (*SHAPES["per-head"][:1], "gqa4", *SHAPES["per-head"][2:]), torch.float32))
    other = torch.arange(60).expand(2, 1, -1)
    arguments[3] = torch.cat([arguments[3], other], 1)
    check(decode_attention, *arguments)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(batch=st.integers(1, 3), heads=st.sampled_from(["mha", "gqa4", "gqa7"]), kept=st.integers(1, 150),
       later=st.integers(1, 9), dim=st.integers(1, 40), kind=st.sampled_from(["none", "padding"]),
       seed=st.integers(0, 99))  # fmt: skip
def test_any_shape(cases, batch, heads, kept, later, dim, kind, seed):
    check(decode_attention, *inputs(cases, (batch, heads, kept, later, 1, dim, dim, kind), torch.float32, seed))
