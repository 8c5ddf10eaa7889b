"""Attention written out around a softmax: every form becomes the paper's, every near miss stays and says why."""

import numpy as np
import pytest
import torch
from support import eager_forms
from support.graph_modules import Wrapped
from support.recording import outcomes
from torch import nn

from zipvl_compile.kernels.ops import ops

FORMS = pytest.mark.parametrize("form", eager_forms.FORMS, ids=lambda f: f.__name__)
HIDDEN = torch.finfo(torch.float64).min


def causal(n=20, rows=None):
    """Return an additive causal mask `[1, 1, rows, n]`, for the newest `rows` queries."""
    mask = torch.full((n, n), HIDDEN, dtype=torch.float64).triu(1)
    return mask[None, None, n - (rows or n) :]


class Eager(nn.Module):
    """One prefill attention of a given form over K and V that are cached with `repeat` times fewer heads."""

    def __init__(self, modules, form, scale=0.4, softcap=None, cached=True):
        super().__init__()
        self.modules, self.form, self.scale, self.softcap, self.cached = modules, form, scale, softcap, cached

    def forward(self, q, k, v, mask=None):
        stored = self.modules.cache(k, v) if self.cached else ()
        factor = q.shape[1] // k.shape[1]
        wide = (self.modules.repeat(x, factor, "expand") if factor > 1 else x for x in (k, v))
        return self.form(q, *wide, mask, self.scale, self.softcap), *stored


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@FORMS
def test_every_form_is_rewritten_to_the_papers_numbers(record, modules, by_the_paper, form, dynamic, kv_heads):
    q, k, v = modules.qkv(kv_heads=kv_heads)
    module = modules.Packed(Eager(modules, form), q, k, v)
    (out, keys, _, kept), recorder = record(module, modules.pack(q, k, v), causal(), dynamic=dynamic)
    assert outcomes(recorder) == [("prefill", "")]
    scale = 0.4
    exact, positions = by_the_paper(q, k, v, scale=scale)
    assert np.array_equal(kept.numpy(), positions) and positions.shape[2] < 20
    assert keys.shape[2] == positions.shape[2] + modules.SPARE
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-6, atol=1e-7)  # one form rounds its scores to float32
    names = [node.target for node in recorder.graphs[0].nodes]
    assert not any(getattr(target, "__name__", target) == "softmax" for target in names), "the old attention is gone"


@pytest.mark.parametrize("softcap", [0.7, 30.0])
@pytest.mark.parametrize(
    "form", [f for f in eager_forms.FORMS if f is not eager_forms.baddbmm], ids=lambda f: f.__name__
)
def test_softcap_reaches_the_operators(record, modules, by_the_paper, form, softcap):
    q, k, v = modules.qkv()
    (out, *_, kept), recorder = record(Eager(modules, form, softcap=softcap), q, k, v, causal())
    assert outcomes(recorder) == [("prefill", "")]
    exact, positions = by_the_paper(q, k, v, scale=0.4, softcap=softcap)
    uncapped, _ = by_the_paper(q, k, v, scale=0.4)
    assert softcap > 1 or not np.allclose(exact, uncapped), "the softcap must matter in this case"
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-6, atol=1e-7)


@FORMS
def test_tau_1_equals_the_form_itself(record, modules, form):
    q, k, v = modules.qkv()
    module = Eager(modules, form)
    before, (after, recorder) = module(q, k, v, causal()), record(module, q, k, v, causal(), tau=1.0)
    assert outcomes(recorder) == [("prefill", "")]
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=1e-7)


@FORMS
def test_decode_is_rewritten(record, modules, paper, form):
    q, k, v = modules.qkv(n=24)
    kept = torch.tensor([[[0, 3, 4, 9, 19]], [[1, 2, 7, 11, 19]]])
    buffers = [torch.cat([ops.gather_tokens(x[:, :, :20], kept, 0), x[:, :, 20:], x[:, :, :3]], 2) for x in (k, v)]

    def decode(q, keys, values, kept, mask):
        wide = (modules.repeat(ops.kv_view(x, kept, 20, 24), 2, "expand") for x in (keys, values))
        return form(q, *wide, mask, 0.4, None)

    out, recorder = record(Wrapped(decode), q[:, :, -2:], *buffers, kept, causal(24, 2))
    assert outcomes(recorder) == [("decode", "")]
    exact = paper.decode(q[:, :, -2:], k, v, kept.numpy(), 20, mask=causal(24, 2), scale=0.4)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("near_miss", eager_forms.NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss_is_untouched_and_names_its_first_difference(record, modules, near_miss):
    q, k, v = modules.qkv(kv_heads=4, value_dim=8)
    module = Eager(modules, near_miss)
    out, recorder = record(module, q, k, v, causal())
    assert not recorder.added[0] and not recorder.erased[0]
    ((kind, reason),) = outcomes(recorder)
    assert kind == "prefill" and "set_attn_implementation('sdpa')" in reason
    difference = eager_forms.NEAR_MISSES[near_miss]
    wanted = f"nearest pattern: eager attention; first difference: {difference})" if difference else "no attention over"
    assert wanted in reason
    torch.testing.assert_close(out[0], module(q, k, v, causal())[0], rtol=1e-12, atol=1e-12)


def test_a_softmax_without_a_cache_is_not_reported(record, modules):
    q, k, v = modules.qkv(kv_heads=4, value_dim=8)
    _, recorder = record(Eager(modules, eager_forms.router, cached=False), q, k, v)
    assert outcomes(recorder) == []


def test_weights_in_another_dtype_stay_dense(record, modules):
    def mixed(q, k, v):
        stored = modules.cache(k, v)
        return torch.softmax(q @ k.transpose(-1, -2) + causal().float(), -1).double() @ v.double(), stored

    _, recorder = record(Wrapped(mixed), *(x.float() for x in modules.qkv(kv_heads=4)))
    ((_, reason),) = outcomes(recorder)
    assert "first difference" in reason


@pytest.mark.parametrize(
    "cut",
    [lambda k: k[:, :, :20], lambda k: k[:, :, -20:], lambda k: k[..., :8], lambda k: k.narrow(2, 0, 20)],
    ids=["head", "tail", "ellipsis", "narrow"],
)
def test_slices_that_keep_everything_are_seen_through(record, modules, by_the_paper, cut):
    def sliced(q, k, v):
        return modules.attend(q, cut(k), cut(v), is_causal=True), *modules.cache(k, v)

    q, k, v = modules.qkv()
    (out, *_, kept), recorder = record(Wrapped(sliced), q, k, v)
    assert outcomes(recorder) == [("prefill", "")]
    exact, positions = by_the_paper(q, k, v)
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


def test_slices_that_drop_tokens_are_not(record, modules):
    def sliced(q, k, v):
        return modules.attend(q[:, :, :19], k[:, :, 1:], v[:, :, 1:], is_causal=True), *modules.cache(k, v)

    _, recorder = record(Wrapped(sliced), *modules.qkv())
    assert not recorder.added[0] and not recorder.erased[0]
