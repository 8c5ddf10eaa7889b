"""A tiny LLaVA end to end: generate, manual loops, second turns, padding, beams, sampling."""

from __future__ import annotations

import pytest
import torch
from support.tiny_llava import compiled, inputs, model, prefill, prompt_cache, shared, step

from zipvl_compile.cache.hf_names import as_argument, cache_of


def test_manual_loop_equals_generate():
    x = inputs(text=20)
    f = shared(tau=0.7)
    generated = f.generate(**x, max_new_tokens=8, do_sample=False)[:, x["input_ids"].shape[1] :]
    out = prefill(f, x | {"logits_to_keep": 1})
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
    with pytest.warns(UserWarning, match="gradients are on"):
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
    cache = prompt_cache(f, x)
    apart = [step(f, turn[:, i : i + 1], cache).logits for i in range(4)]
    torch.testing.assert_close(together.logits, torch.cat(apart, 1), atol=2e-5, rtol=1e-4)


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


def test_short_prompts_stay_dense_and_longer_ones_do_not():
    f = shared(tau=0.6, min_tokens=90)
    short, long = prefill(f, inputs(text=12)), prefill(f, inputs(text=60))
    assert all(layer.positions is None for layer in cache_of(short).layers)
    assert all(layer.positions.shape[2] < layer.prompt_length for layer in cache_of(long).layers)
    torch.testing.assert_close(short.logits, prefill(model(), inputs(text=12)).logits, atol=2e-5, rtol=1e-4)
    again = prefill(f, inputs(text=11))
    assert all(layer.positions is None for layer in cache_of(again).layers)


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
