"""The cache layer: what it holds, its logical length, and every operation of transformers on it, on a tiny LLaVA."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_llava import compiled, inputs, model, prefill, prompt_cache, shared, step
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from zipvl_compile.cache.buffers import spare_tokens
from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.report.compile_report import collect


def test_the_layer_registers_itself_for_full_attention_and_nothing_else():
    assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is CompactLayer
    assert [k for k, v in DYNAMIC_LAYER_TYPE_MAPPING.items() if v is CompactLayer] == ["full_attention"]


def test_memory_is_freed_and_the_length_stays_logical():
    out = prefill(shared(tau=0.6), inputs(text=30))
    n = inputs(text=30)["input_ids"].shape[1]
    for layer in cache_of(out).layers:
        p = layer.positions.shape[2]
        assert p < 0.7 * n
        assert layer.get_seq_length() == n and layer.get_mask_sizes(1) == (n + 1, 0)
        assert layer.keys.shape[2] == p == layer.cached_length
        per_token = layer.keys.shape[0] * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size()
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == (p + spare_tokens(n)) * per_token


def test_evict_keep_keeps_the_full_cache_and_still_sparsifies_the_prefill():
    x = inputs(text=30)
    full = prefill(shared(tau=0.6, evict="keep"), x)
    sparse = prefill(shared(tau=0.6), x)
    n = x["input_ids"].shape[1]
    assert all(layer.keys.shape[2] == n for layer in cache_of(full).layers)
    torch.testing.assert_close(full.logits, sparse.logits)
    assert not torch.allclose(full.logits, prefill(model(), x).logits, atol=1e-3)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_growing_beyond_the_spare_room_changes_no_token(tau):
    x = inputs(text=20)
    f = shared(tau=tau)
    new = spare_tokens(x["input_ids"].shape[1]) + 12
    out = f.generate(**x, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    layer = cache_of(out).layers[0]
    assert layer.key_buffer.shape[2] > layer.cached_length > layer.positions.shape[2] + 32
    if tau == 1.0:
        assert torch.equal(out.sequences, model().generate(**x, max_new_tokens=new, do_sample=False))
    else:  # the same tokens, one at a time, through a cache whose room never runs out
        again = f.generate(**x, max_new_tokens=8, do_sample=False)
        assert torch.equal(out.sequences[:, : again.shape[1]], again)


def test_decode_appends_in_place():
    f = shared(tau=0.7)
    cache = prompt_cache(f, inputs(text=20))
    where = [layer.key_buffer.data_ptr() for layer in cache.layers]
    for token in (5, 6, 7):
        step(f, torch.tensor([[token]]), cache)
    assert [layer.key_buffer.data_ptr() for layer in cache.layers] == where


@pytest.mark.parametrize("tokens", [-3, torch.tensor(-3)], ids=["number", "tensor"])
def test_crop_of_generated_tokens_continues_as_if_they_never_were(tokens):
    x = inputs(text=20)
    f = shared(tau=0.7)
    cache = prompt_cache(f, x)
    expected = step(f, torch.tensor([[9]]), copy.deepcopy(cache)).logits
    for token in (5, 6, 7):
        step(f, torch.tensor([[token]]), cache)
    cache.crop(tokens)  # assisted decoding of transformers 5.17 gives a tensor
    assert cache.get_seq_length() == x["input_ids"].shape[1]
    assert all(type(layer.cumulative_length) is int for layer in cache.layers)
    assert torch.equal(step(f, torch.tensor([[9]]), cache).logits, expected)


def test_crop_into_the_prompt_keeps_the_kept_tokens_before_the_cut():
    cache = prompt_cache(shared(tau=0.7), inputs(text=20))
    layer = cache.layers[0]
    kept, keys = layer.positions.clone(), layer.keys.clone()
    n = layer.prompt_length - 10
    cache.crop(-10)
    p = int((kept < n).sum())
    assert torch.equal(layer.positions, kept[:, :, :p]) and torch.equal(layer.keys, keys[:, :, :p])
    assert layer.get_seq_length() == n and layer.cached_positions.shape[2] == layer.keys.shape[2]


def test_crop_refuses_what_it_cannot_do_and_changes_nothing():
    layer = CompactLayer()
    layer.key_buffer = layer.value_buffer = torch.randn(2, 1, 4, 2)
    layer.positions = torch.tensor([[[0, 1, 8]], [[0, 8, 9]]])
    layer.prompt_length = layer.cumulative_length = 10
    layer.is_initialized = True
    for bad, message in ((3, "negative"), (-11, "at most 10"), (-3, "batch of 2")):
        with pytest.raises(ValueError, match=message):
            layer.crop(bad)
        assert layer.positions.shape[2] == 3 and layer.get_seq_length() == 10


def test_batch_operations_act_on_keys_values_and_positions():
    cache = prompt_cache(shared(tau=0.7), inputs(batch=2, text=20))
    before = [(layer.keys.clone(), layer.values.clone(), layer.cached_positions.clone()) for layer in cache.layers]

    def check(index):
        for layer, state in zip(cache.layers, before, strict=True):
            for now, old in zip((layer.keys, layer.values, layer.cached_positions), state, strict=True):
                assert torch.equal(now, old[index])

    cache.batch_repeat_interleave(2)
    check([0, 0, 1, 1])
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    check([1, 0, 0, 1])
    cache.batch_select_indices(torch.tensor([0, 1]))
    check([1, 0])


def test_reset_empties_the_cache_for_another_prompt():
    f = shared(tau=0.7)
    x = inputs(text=20)
    fresh = prefill(f, x)
    cache = prompt_cache(f, inputs(text=11, seed=3))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].keys is None
    with torch.no_grad():
        again = f(**x, **as_argument(cache), use_cache=True)
    # another graph than the first prompt ran through, of dynamic shapes: its sums may round otherwise
    torch.testing.assert_close(again.logits, fresh.logits)
    for now, then in zip(cache.layers, cache_of(fresh).layers, strict=True):
        assert torch.equal(now.positions, then.positions)


BAD_STATES = {
    "batch": ((1, 2, 1, 16), (1, 2, 1, 16), "batch, heads and head_dim"),
    "head_dim": ((2, 2, 1, 16), (2, 2, 1, 8), "batch, heads and head_dim"),
    "tokens": ((2, 2, 1, 16), (2, 2, 2, 16), "as many tokens as key_states, 1, got 2"),
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_tensors_that_do_not_continue_a_compacted_cache_are_refused_and_it_is_unchanged(bad):
    cache = prompt_cache(shared(tau=0.7), inputs(batch=2, text=20))
    layer = cache.layers[0]
    n, keys = cache.get_seq_length(), layer.key_buffer.clone()
    *shapes, message = BAD_STATES[bad]
    with pytest.raises(ValueError, match=message):
        cache.update(*map(torch.randn, shapes), 0)
    assert cache.get_seq_length() == n and torch.equal(layer.key_buffer, keys)


def test_a_dense_inductor_like_backend_is_untouched_by_the_registered_layer():
    torch._dynamo.reset()  # of the code that all models share, PyTorch has reached its limit
    x = inputs(text=20)
    f = model()
    f.compile(backend="eager")
    out = f.generate(**x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model().generate(**x, max_new_tokens=6, do_sample=False))
    for layer in cache_of(out).layers:
        assert layer.positions is None and layer.keys.shape[2] == layer.get_seq_length()


def test_a_cache_without_config_stays_dense_right_and_reported():
    torch._dynamo.reset()  # of the code that all models share, PyTorch has reached its limit
    x = inputs(text=20)
    f = compiled(tau=0.5)
    with collect() as reports, torch.no_grad():
        out = f(**x, **as_argument(DynamicCache()), use_cache=True)
    torch.testing.assert_close(out.logits, prefill(model(), x).logits)
    reasons = {site.reason for report in reports for site in report.sites if "language_model" in site.layer}
    assert any("DynamicCache(config=model.config)" in str(reason) for reason in reasons), reasons
