"""Physical keys in eager attention: a mask of logical length is an error that says why; other errors stay their own."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.tiny_llava import compiled, inputs, model, prompt_cache, shared, step

from zipvl_compile.cache import eager_fallback
from zipvl_compile.cache.eager_fallback import read_in_eager
from zipvl_compile.cache.hf_names import as_argument

CACHED, LOGICAL = 5, 9


def attend_by_sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


def attend_by_sdpa_with_names(q, k, v, mask):
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)


def repeated(x):
    b, h, n, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d)


def attend_over_repeated_heads(q, k, v, mask):
    return F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), repeated(k), repeated(v), attn_mask=mask)


def softmax_of(add_mask):
    def attend(q, k, v, mask):
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        return torch.softmax(scores if mask is None else add_mask(scores, mask), -1) @ v

    return attend


def added_in_place(scores, mask):
    scores += mask
    return scores


FORMS = {
    "sdpa": attend_by_sdpa,
    "sdpa-names": attend_by_sdpa_with_names,
    "sdpa-repeated": attend_over_repeated_heads,
    "add": softmax_of(lambda scores, mask: scores + mask),
    "add-first": softmax_of(lambda scores, mask: mask + scores),
    "add-in-place": softmax_of(added_in_place),
    "masked_fill": softmax_of(lambda scores, mask: scores.masked_fill(mask < 0, -1e9)),
    "where": softmax_of(lambda scores, mask: torch.where(mask < 0, torch.tensor(-1e9), scores)),
}


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 4, generator=generator) for n in (1, CACHED, CACHED)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [None, 1, CACHED])
def test_attention_without_a_mask_that_does_not_fit_is_what_it_is_on_plain_keys(qkv, form, length):
    q, k, v = qkv
    mask = None if length is None else torch.zeros(2, 1, 1, length)
    if length == CACHED:
        mask[0, ..., 1] = -1e9
    got = FORMS[form](q, read_in_eager(k), v, mask)
    assert type(got) is torch.Tensor
    assert torch.equal(got, FORMS[form](q, k, v, mask))


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_over_all_tokens_is_an_error_with_the_remedy(qkv, form):
    q, k, v = qkv
    with pytest.raises(RuntimeError, match=rf"mask over all {LOGICAL} tokens.*model\.compile\(backend='zipvl'\)"):
        FORMS[form](q, read_in_eager(k), v, torch.zeros(2, 1, 1, LOGICAL))


@pytest.mark.parametrize("form", ["sdpa", "add"])
def test_one_cached_token_and_a_longer_mask_is_an_error_too(qkv, form):
    q, k, v = (x[:, :, :1] for x in qkv)  # such a mask would broadcast
    with pytest.raises(RuntimeError, match="mask over all"):
        FORMS[form](q, read_in_eager(k), v, torch.zeros(2, 1, 1, LOGICAL))


ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuBLAS is unwell")]


@pytest.mark.parametrize("error", ERRORS, ids=["memory", "other"])
@pytest.mark.parametrize("length", [None, CACHED])
@pytest.mark.parametrize("kind", ["sdpa", "_PRODUCTS", "_MASKING"])
def test_other_errors_of_attention_pass_unchanged(qkv, monkeypatch, kind, length, error):
    def fails(*operands):
        raise error

    q, k, v = qkv
    keys = read_in_eager(k)
    mask = None if length is None else torch.zeros(2, 1, 1, length)
    operands = (q, keys, v, mask) if kind == "sdpa" else (torch.matmul(q, keys.transpose(2, 3)), mask)
    if kind == "sdpa":
        monkeypatch.setattr(F, "scaled_dot_product_attention", fails)
    else:
        monkeypatch.setattr(eager_fallback, kind, getattr(eager_fallback, kind) | {fails})
    with pytest.raises(RuntimeError) as raised:
        torch.overrides.handle_torch_function(fails, operands, *operands)
    assert raised.value is error


def test_keys_of_another_width_are_no_mask_problem(qkv):
    q, k, _ = qkv
    with pytest.raises(RuntimeError) as raised:
        q[..., :3] @ read_in_eager(k).transpose(2, 3)
    assert "zipvl" not in str(raised.value)


def test_eager_decode_of_one_token_on_a_compacted_cache_equals_compiled():
    x = inputs(text=20)
    f = shared(tau=0.7)
    cache = prompt_cache(f, x)
    other = copy.deepcopy(cache)
    expected = step(f, torch.tensor([[9]]), cache).logits
    torch.testing.assert_close(step(model(), torch.tensor([[9]]), other).logits, expected, atol=2e-5, rtol=1e-4)
    assert type(other.layers[0].key_buffer) is torch.Tensor


def test_eager_read_of_a_compacted_cache_that_would_be_wrong_is_an_error_with_the_remedy():
    f = shared(tau=0.7)
    cache = prompt_cache(f, inputs(text=20))
    with pytest.raises(RuntimeError, match=r"2 new tokens.*model.compile\(backend='zipvl'\)"):
        step(model(), torch.tensor([[9, 10]]), cache)
    assert cache.get_seq_length() == inputs(text=20)["input_ids"].shape[1]
    padded = inputs(batch=2, text=16, pad=6)
    cache = prompt_cache(f, padded)
    mask = torch.cat([padded["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with pytest.raises(RuntimeError, match=r"mask over all \d+ tokens"), torch.no_grad():
        model()(input_ids=torch.tensor([[9], [9]]), attention_mask=mask, **as_argument(cache))


def test_generate_on_the_wrapper_warns_once_with_the_remedy_and_only_then():
    x = inputs(text=9)
    plain = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.generate(**x, max_new_tokens=2, do_sample=False)
        f = compiled(tau=1.0)
        f.generate(**x, max_new_tokens=2, do_sample=False)
    wrapped = torch.compile(model(), backend="zipvl")
    with pytest.warns(UserWarning, match=r"Use model.compile\(backend=\"zipvl\"\)"):
        wrapped.generate(**x, max_new_tokens=2, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped.generate(**x, max_new_tokens=2, do_sample=False)
