"""Continuations of one prefix: they share its memory until they grow, and change nothing of each other."""

import copy

import pytest
import torch
from support import tiny_models
from support.tiny_llava import inputs, prompt_cache, shared, step
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache, StaticLayer

from zipvl_compile.cache.fork import fork
from zipvl_compile.cache.hf_names import as_argument, cache_of

QUESTIONS = [torch.randint(6, 128, (1, m), generator=torch.Generator().manual_seed(m)) for m in (1, 7, 140)]
OPTIONS = ({"tau": 0.6}, {"tau": 1.0}, {"min_tokens": 1000})


@pytest.mark.parametrize("options", OPTIONS, ids=["compacted", "every token", "dense"])
def test_a_fork_goes_on_as_a_deep_copy_does_and_leaves_the_prefix_alone(options):
    f = shared(**options)
    prefix = prompt_cache(f, inputs(text=30))
    before = copy.deepcopy(prefix)
    for question in QUESTIONS:
        one, other = fork(prefix), copy.deepcopy(before)
        for cache in (one, other):
            assert type(cache) is type(prefix) and cache.get_seq_length() == prefix.get_seq_length()
        logits = [step(f, question, cache).logits for cache in (one, other)]
        torch.testing.assert_close(*logits)
        torch.testing.assert_close(step(f, question[:, :1], one).logits, step(f, question[:, :1], other).logits)
    for a, b in zip(prefix.layers, before.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        assert torch.equal(a.key_buffer[:, :, : a.cached_length], b.key_buffer[:, :, : b.cached_length])


def test_nothing_is_copied_before_one_of_them_grows():
    f = shared(tau=0.6)
    prefix = prompt_cache(f, inputs(text=30))
    one, two = fork(prefix), fork(prefix)
    where = [layer.key_buffer.data_ptr() for layer in prefix.layers]
    assert all([layer.key_buffer.data_ptr() for layer in cache.layers] == where for cache in (one, two))
    step(f, QUESTIONS[0], one)
    assert all(layer.key_buffer.data_ptr() not in where for layer in one.layers)
    step(f, QUESTIONS[1], prefix)  # the prefix itself may go on, too
    assert [layer.key_buffer.data_ptr() for layer in two.layers] == where
    assert two.get_seq_length() + 7 == prefix.get_seq_length() and two.layers[0] is not prefix.layers[0]


def test_an_output_is_forked_and_sliding_windows_go_on():
    f = tiny_models.compiled("gemma3", keep_ratio=0.5)
    x = tiny_models.inputs("gemma3")
    by_token = {name: make(QUESTIONS[1]) for name, make in tiny_models.FAMILIES["gemma3"].by_token.items()}
    with torch.no_grad():
        out = f(**x, use_cache=True)
        alone = copy.deepcopy(cache_of(out))
        logits = [
            f(input_ids=QUESTIONS[1], **as_argument(cache), use_cache=True, **by_token).logits
            for cache in (fork(out), fork(out), alone)
        ]
    torch.testing.assert_close(logits[0], logits[2])
    torch.testing.assert_close(logits[1], logits[2])


def test_layers_that_write_in_place_are_copied():
    layer = StaticLayer(max_cache_len=8)
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), {"cache_position": torch.arange(2)})
    cache = DynamicCache()
    cache.layers = [layer]
    other = fork(cache)
    assert torch.equal(other.layers[0].keys, layer.keys)
    assert other.layers[0].keys.data_ptr() != layer.keys.data_ptr()


@pytest.mark.parametrize("what", [None, "cache", EncoderDecoderCache(DynamicCache(), DynamicCache())])
def test_what_is_no_cache_of_layers_is_refused(what):
    with pytest.raises(TypeError, match="cache: expected a transformers Cache of layers"):
        fork(what)
