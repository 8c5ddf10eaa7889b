"""The cache layer end to end: generate, manual loops, second turns, and every batch operation, on a tiny LLaVA."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.tiny_llava import compiled, inputs, model, shared
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

import zipvl_compile
from zipvl_compile.cache.compact_layer import CompactLayer, spare_tokens
from zipvl_compile.cache.hf_names import as_argument, cache_of


def prefill(f, x):
    """Run the prompt through `f` and return its output, as a manual loop does."""
    with torch.no_grad():
        return f(**x, use_cache=True)


def step(f, token, cache):
    with torch.no_grad():
        return f(input_ids=token, **as_argument(cache), use_cache=True)


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


def test_manual_loop_equals_generate():
    x = inputs(text=20)
    f = shared(tau=0.7)
    generated = f.generate(**x, max_new_tokens=8, do_sample=False)[:, x["input_ids"].shape[1] :]
    out = prefill(f, x)
    tokens = [out.logits[:, -1:].argmax(-1)]
    for _ in range(7):
        out = step(f, tokens[-1], cache_of(out))
        tokens.append(out.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), generated)


def test_manual_loop_without_no_grad_is_sparse_in_eval_mode():
    f = shared(tau=0.7)
    x = inputs(text=20)
    out = f(**x, use_cache=True)
    assert not out.logits.requires_grad
    assert all(layer.positions.shape[2] < layer.prompt_length for layer in cache_of(out).layers)
    f(input_ids=torch.tensor([[9]]), **as_argument(cache_of(out)))


def test_torch_compile_as_a_callable_equals_model_compile():
    x = inputs(text=20)
    reference = prefill(shared(tau=0.7), x)
    f = torch.compile(model(), backend="zipvl", options={"tau": 0.7, "inner": "eager", "min_tokens": 0})
    out = prefill(f, x)
    assert torch.equal(out.logits, reference.logits)
    a = step(f, torch.tensor([[7]]), cache_of(out)).logits
    assert torch.equal(a, step(f, torch.tensor([[7]]), cache_of(reference)).logits)


def test_training_mode_stays_dense_differentiable_and_says_so():
    f = compiled(tau=0.5)
    f.train()
    with pytest.warns(UserWarning, match="gradients are needed"):
        out = f(**inputs(text=9), use_cache=True)
    out.logits.sum().backward()
    assert f.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(layer.positions is None for layer in cache_of(out).layers)


def test_use_cache_false_stays_right():
    x = inputs(text=20)
    with torch.no_grad():
        out = shared(tau=0.7)(**x, use_cache=False)
        expected = model()(**x, use_cache=False)
    assert cache_of(out) is None
    torch.testing.assert_close(out.logits, expected.logits)


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
    cache = cache_of(prefill(f, inputs(text=20)))
    where = [layer.key_buffer.data_ptr() for layer in cache.layers]
    for token in (5, 6, 7):
        step(f, torch.tensor([[token]]), cache)
    assert [layer.key_buffer.data_ptr() for layer in cache.layers] == where


def second_turn(f, x, turn):
    out = prefill(f, x)
    return step(f, turn, cache_of(out)), cache_of(out)


def test_second_turn_of_several_tokens_at_tau_1_equals_eager():
    x, turn = inputs(text=20), torch.tensor([[9, 10, 11, 12]])
    out, cache = second_turn(shared(tau=1.0), x, turn)
    expected, _ = second_turn(model(), x, turn)
    torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == x["input_ids"].shape[1] + 4


def test_second_turn_on_a_compacted_cache_equals_the_same_tokens_one_by_one():
    x, turn = inputs(text=20), torch.tensor([[9, 10, 11, 12]])
    f = shared(tau=0.7)
    together, _ = second_turn(f, x, turn)
    cache = cache_of(prefill(f, x))
    apart = [step(f, turn[:, i : i + 1], cache).logits for i in range(4)]
    torch.testing.assert_close(together.logits, torch.cat(apart, 1), atol=2e-5, rtol=1e-4)


def test_crop_of_generated_tokens_continues_as_if_they_never_were():
    x = inputs(text=20)
    f = shared(tau=0.7)
    cache = cache_of(prefill(f, x))
    expected = step(f, torch.tensor([[9]]), copy.deepcopy(cache)).logits
    for token in (5, 6, 7):
        step(f, torch.tensor([[token]]), cache)
    cache.crop(-3)
    assert cache.get_seq_length() == x["input_ids"].shape[1]
    assert torch.equal(step(f, torch.tensor([[9]]), cache).logits, expected)


def test_crop_into_the_prompt_keeps_the_kept_tokens_before_the_cut():
    cache = cache_of(prefill(shared(tau=0.7), inputs(text=20)))
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
    cache = cache_of(prefill(shared(tau=0.7), inputs(batch=2, text=20)))
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
    cache = cache_of(prefill(f, inputs(text=11, seed=3)))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].keys is None
    with torch.no_grad():
        again = f(**x, **as_argument(cache), use_cache=True)
    assert torch.equal(again.logits, fresh.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_tau_1_equals_eager(side):
    x = inputs(batch=2, text=16, pad=6, side=side)
    f, expected = prefill(shared(tau=1.0), x), prefill(model(), x)
    valid = x["attention_mask"].bool()
    torch.testing.assert_close(f.logits[valid], expected.logits[valid], atol=2e-5, rtol=1e-4)


def test_left_padding_below_tau_1_drops_padding_first():
    x = inputs(batch=2, text=16, pad=9)
    out = shared(tau=0.8).generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    for layer in cache_of(out).layers:
        assert layer.positions.shape[2] < layer.prompt_length
        padded = layer.positions[0, 0] < 9
        others = layer.prompt_length - 9
        assert not padded.any() or layer.positions.shape[2] > others


def test_sampling_repeats_with_a_seed_and_equals_eager_at_tau_1():
    x = inputs(text=20)
    runs = []
    for f in (shared(tau=1.0), model(), shared(tau=1.0)):
        torch.manual_seed(5)
        runs.append(f.generate(**x, max_new_tokens=8, do_sample=True, top_k=20))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_beam_search_at_tau_1_equals_eager():
    x = inputs(text=12)
    args = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(shared(tau=1.0).generate(**x, **args), model().generate(**x, **args))


def test_beam_search_on_a_compacted_cache_runs():
    out = shared(tau=0.7).generate(**inputs(text=12), max_new_tokens=6, num_beams=3, do_sample=False)
    assert out.shape[1] == inputs(text=12)["input_ids"].shape[1] + 6


def test_a_dense_inductor_like_backend_is_untouched_by_the_registered_layer():
    x = inputs(text=20)
    f = model()
    f.compile(backend="eager")
    out = f.generate(**x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model().generate(**x, max_new_tokens=6, do_sample=False))
    for layer in cache_of(out).layers:
        assert layer.positions is None and layer.keys.shape[2] == layer.get_seq_length()


def test_eager_decode_of_one_token_on_a_compacted_cache_equals_compiled():
    x = inputs(text=20)
    f = shared(tau=0.7)
    cache = cache_of(prefill(f, x))
    other = copy.deepcopy(cache)
    expected = step(f, torch.tensor([[9]]), cache).logits
    torch.testing.assert_close(step(model(), torch.tensor([[9]]), other).logits, expected, atol=2e-5, rtol=1e-4)
    assert type(other.layers[0].keys) is torch.Tensor


def test_eager_read_of_a_compacted_cache_that_would_be_wrong_is_an_error_with_the_remedy():
    f = shared(tau=0.7)
    cache = cache_of(prefill(f, inputs(text=20)))
    with pytest.raises(RuntimeError, match=r"2 new tokens.*model.compile\(backend='zipvl'\)"):
        step(model(), torch.tensor([[9, 10]]), cache)
    assert cache.get_seq_length() == inputs(text=20)["input_ids"].shape[1]
    padded = inputs(batch=2, text=16, pad=6)
    cache = cache_of(prefill(f, padded))
    mask = torch.cat([padded["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with pytest.raises(RuntimeError, match=r"mask over all \d+ tokens"), torch.no_grad():
        model()(input_ids=torch.tensor([[9], [9]]), attention_mask=mask, **as_argument(cache))


def test_a_cache_that_another_batch_filled_is_refused_and_unchanged():
    cache = cache_of(prefill(model(), inputs(batch=2, text=20)))
    n = cache.get_seq_length()
    with pytest.raises(ValueError, match="batch, heads and head_dim"):
        cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    assert cache.get_seq_length() == n and cache.layers[0].keys.shape[2] == n


def test_a_cache_without_config_stays_dense_right_and_reported():
    x = inputs(text=20)
    f = shared(tau=0.5)
    with zipvl_compile.report.compile_report.collect() as reports, torch.no_grad():
        out = f(**x, **as_argument(DynamicCache()), use_cache=True)
    torch.testing.assert_close(out.logits, prefill(model(), x).logits)
    reasons = {site.reason for report in reports for site in report.sites if "language_model" in site.layer}
    assert any("DynamicCache(config=model.config)" in reason for reason in reasons), reasons


def test_kept_tokens_returns_positions_per_layer():
    out = shared(tau=0.7).generate(**inputs(text=20), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    n = inputs(text=20)["input_ids"].shape[1]
    cache = cache_of(out)
    for kept, same, layer in zip(*map(zipvl_compile.kept_tokens, (out, cache)), cache.layers, strict=True):
        assert torch.equal(kept, same)
        assert kept.dtype == torch.int64 and kept.shape == (1, 1, layer.keys.shape[2])
        assert (kept.diff(dim=-1) > 0).all() and kept[0, 0, -3:].tolist() == [n, n + 1, n + 2]
        assert (n - 1) in kept[0, 0]
    for bad in (cache.layers, out.sequences, None):
        with pytest.raises(
            TypeError, match=f"cache: expected a transformers Cache or an output.*got {type(bad).__name__}"
        ):
            zipvl_compile.kept_tokens(bad)


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


def test_short_prompts_stay_dense_and_longer_ones_do_not():
    f = shared(tau=0.6, min_tokens=90)
    short, long = prefill(f, inputs(text=12)), prefill(f, inputs(text=60))
    assert all(layer.positions.shape[2] == layer.prompt_length for layer in cache_of(short).layers)
    assert all(layer.positions.shape[2] < layer.prompt_length for layer in cache_of(long).layers)
    torch.testing.assert_close(short.logits, prefill(model(), inputs(text=12)).logits, atol=2e-5, rtol=1e-4)
    again = prefill(f, inputs(text=11))
    assert all(layer.positions.shape[2] == layer.prompt_length for layer in cache_of(again).layers)


def test_a_prompt_of_one_token_equals_eager():
    f, e = shared(tau=0.5), model()
    token = torch.tensor([[9]])
    with torch.no_grad():
        out, expected = f(input_ids=token, use_cache=True), e(input_ids=token, use_cache=True)
        torch.testing.assert_close(out.logits, expected.logits)
        a, b = (m(input_ids=token, **as_argument(cache_of(o))).logits for m, o in ((f, out), (e, expected)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_give_what_dense_gives(bad):
    f, e = compiled(tau=0.5), model()
    for m in (f, e):
        with torch.no_grad():
            m.model.language_model.layers[0].self_attn.q_proj.weight[0, 0] = bad
    x = inputs(text=12)
    torch.testing.assert_close(prefill(f, x).logits, prefill(e, x).logits, equal_nan=True)
