"""What people do to a KV cache between two calls of a compiled model, compared with transformers or with a copy."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.cache_copies import stored_and_loaded
from support.tiny_llava import compiled, inputs, model, prefill, prompt_cache, shared, step
from transformers import DynamicCache

from zipvl_compile.cache.hf_names import as_argument

EVERY = {"tau": 1.0}
SPARSE = {"tau": 0.7}
HEADS = {"tau": 0.7, "groups": "kv_head"}
BOTH = pytest.mark.parametrize("options", [EVERY, SPARSE, HEADS], ids=["tau=1", "tau=0.7", "kv_head"])
QUESTIONS = [[9, 10, 11], [20, 21], [30]]


def answer(f, cache, question, new=4):
    """Return the tokens that a greedy loop adds after a question on a cached prefix."""
    token, tokens = torch.tensor([question]), []
    for _ in range(new):
        token = step(f, token, cache).logits[:, -1:].argmax(-1)
        tokens.append(token.item())
    return tokens


def forked(cache):
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def rebuilt(cache):
    return DynamicCache([pair[:2] for pair in cache], config=model().config.get_text_config())


def updated(cache):
    new = DynamicCache(config=model().config.get_text_config())
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, index)
    return new


def there_and_back(cache):
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.double().to("cpu"), layer.values.double()
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    return cache


COPIES = {
    "deepcopy": copy.deepcopy,
    "forked containers": forked,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": stored_and_loaded,
    "rebuilt from pairs": rebuilt,
    "through update": updated,
    "moved and moved back": there_and_back,
}


@BOTH
@pytest.mark.parametrize("how", COPIES)
def test_several_questions_on_copies_of_one_prefix_are_answered_as_each_alone(how, options):
    f, x = shared(**options), inputs(text=20)
    alone = [answer(f, prompt_cache(f, x), question) for question in QUESTIONS]
    stored = prompt_cache(f, x)
    copies = [COPIES[how](stored) for _ in QUESTIONS]
    assert [answer(f, each, question) for each, question in zip(copies, QUESTIONS, strict=True)] == alone
    if options == EVERY:
        stock = model()
        assert alone == [answer(stock, prompt_cache(stock, x), question) for question in QUESTIONS]


def test_steps_on_two_forks_are_interleaved():
    f, x = shared(**EVERY), inputs(text=20)
    stock = model()
    logits = []
    for g in (f, stock):
        one = prompt_cache(g, x)
        two = forked(one)
        for token in (11, 12, 13):
            step(g, torch.tensor([[token]]), one)
            step(g, torch.tensor([[token + 20]]), two)
        logits.append(step(g, torch.tensor([[14]]), one).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=1e-4)


def test_pairs_without_a_config_are_refused_where_tokens_were_dropped():
    pairs = [pair[:2] for pair in prompt_cache(shared(**SPARSE), inputs(text=20))]
    with pytest.raises(RuntimeError, match=r"config=model\.config"):
        DynamicCache(pairs)
    every = prompt_cache(shared(**EVERY), inputs(text=20))
    assert DynamicCache([pair[:2] for pair in every]).get_seq_length() == every.get_seq_length()


def test_a_cache_that_is_shortened_by_assignment_is_right_or_refused():
    x, logits = inputs(text=20), []
    for f in (shared(**EVERY), model()):
        cache = prompt_cache(f, x)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :30], layer.values[:, :, :30]
        assert cache.get_seq_length() == 30
        logits.append(step(f, torch.tensor([[9]]), cache).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)
    cache = prompt_cache(shared(**SPARSE), x)
    with pytest.raises(ValueError, match=r"keys: expected keys and values of every token.*cache\.crop"):
        cache.layers[0].keys = cache.layers[0].keys[:, :, :30]
    assert cache.get_seq_length() == x["input_ids"].shape[1]


def test_two_caches_joined_into_a_batch_are_right_or_refused():
    a, b = inputs(text=20), inputs(text=20, seed=1)

    def joined(f):
        pairs = [
            (torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]]))
            for one, two in zip(prompt_cache(f, a), prompt_cache(f, b), strict=True)
        ]
        return DynamicCache(pairs, config=f.config.get_text_config())

    token = torch.tensor([[9], [9]])
    got = step(shared(**EVERY), token, joined(shared(**EVERY))).logits
    torch.testing.assert_close(got, step(model(), token, joined(model())).logits, atol=2e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="cannot be joined"):
        joined(shared(**SPARSE))


@BOTH
@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1], [1, 0]], ids=str)
def test_the_batch_grows_shrinks_or_turns_between_prefill_and_decode(rows, options):
    f, x = shared(**options), inputs(batch=2, text=20)
    cache = prompt_cache(f, x)
    cache.batch_select_indices(torch.tensor(rows))
    got = step(f, torch.full((len(rows), 1), 9), cache).logits
    whole = step(f, torch.full((2, 1), 9), prompt_cache(f, x)).logits
    torch.testing.assert_close(got, whole[rows], atol=2e-5, rtol=1e-4)
    if options == EVERY:
        stock = model()
        expected = step(stock, torch.full((2, 1), 9), prompt_cache(stock, x)).logits
        torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-4)


@BOTH
def test_rejected_tokens_are_cropped_as_if_they_never_were(options):
    f, x = shared(**options), inputs(text=20)
    cache = prompt_cache(f, x)
    expected = answer(f, copy.deepcopy(cache), [9])
    for rejected in (1, 4, 2):
        step(f, torch.full((1, rejected), 77), cache)
        cache.crop(-rejected)
    assert answer(f, cache, [9]) == expected


def test_the_cache_of_one_compiled_model_in_another_with_other_options():
    x = inputs(text=20)
    other = compiled(keep_ratio=0.5)
    prefill(other, x)
    cache = prompt_cache(shared(**SPARSE), x)
    expected = answer(shared(**SPARSE), copy.deepcopy(cache), [9])
    assert answer(other, cache, [9]) == expected


def test_an_eager_prompt_is_decoded_by_a_compiled_model_and_back():
    x, stock = inputs(text=20), model()
    expected = answer(stock, prompt_cache(stock, x), [9], new=6)
    for f, g in ((stock, shared(**EVERY)), (shared(**EVERY), stock)):
        cache = prompt_cache(f, x)
        first = answer(g, cache, [9], new=3)
        assert first + answer(f, cache, first[-1:], new=3) == expected


def test_the_compiled_prompt_of_a_user_who_goes_on_in_eager_mode_is_said_once():
    from zipvl_compile.cache import eager_fallback

    eager_fallback.warn_of_eager_decode.cache_clear()
    f, x = shared(**SPARSE), inputs(text=20)
    expected = answer(f, prompt_cache(f, x), [9])
    with pytest.warns(UserWarning, match="runs uncompiled.*recompile limit") as said:
        assert answer(model(), prompt_cache(f, x), [9]) == expected
    assert len(said) == 1


def test_a_cache_handed_in_empty_is_filled_and_can_be_used_again():
    f, x = shared(**SPARSE), inputs(text=20)
    expected = prefill(f, x).logits
    cache = DynamicCache(config=f.config.get_text_config())
    for _ in range(2):
        with torch.no_grad():
            # each with a graph that is there by then: their sums may round otherwise
            torch.testing.assert_close(f(**x, **as_argument(cache), use_cache=True).logits, expected)
        cache.reset()
