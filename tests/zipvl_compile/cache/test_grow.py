"""A static cache that got more room goes on as one that had it from the start."""

import pytest
import torch
from support import tiny_llama, tiny_models
from transformers import DynamicCache, StaticCache

import zipvl_compile
from zipvl_compile.cache.compact_static_layer import CompactStaticLayer
from zipvl_compile.cache.grow import grow
from zipvl_compile.cache.hf_names import as_argument
from zipvl_compile.kernels.fixed_rows import bucket

N, FIRST, MORE = 60, 5, 40


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def tokens(f, cache, count, ids):
    """Return logits of a part and of `count` greedy tokens after it."""
    found = []
    with torch.no_grad():
        for _ in range(count + 1):
            out = f(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
            found.append(out.logits[:, -1])
            ids = found[-1].argmax(-1, keepdim=True)
    return torch.stack(found)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("how", [None, {"keep_ratio": 0.4}, {"tau": 1.0}], ids=["stock", "compacted", "whole"])
def test_it_goes_on_as_one_that_had_room_from_the_start(how, batch):
    f = tiny_llama.model() if how is None else tiny_llama.compiled(**how)
    ids, next_ids = tiny_llama.prompt(N, batch), tiny_llama.prompt(1, batch, seed=3)
    found = []
    for grows in (False, True):
        cache = StaticCache(config=f.config, max_cache_len=N + FIRST + (0 if grows else MORE))
        one = tokens(f, cache, FIRST, ids)
        if grows:
            before = [layer.max_cache_len for layer in cache.layers]
            grow(cache, MORE)
            assert [layer.max_cache_len for layer in cache.layers] == [n + MORE for n in before]
        found.append(torch.cat([one, tokens(f, cache, MORE - 1, next_ids)]))
        assert int(cache.get_seq_length()) == N + FIRST + MORE
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)
    if how == {"keep_ratio": 0.4}:
        for layer in cache.layers:
            assert isinstance(layer, CompactStaticLayer) and layer.key_buffer.shape[2] == bucket(24 + FIRST + MORE)
            assert torch.equal(layer.where[0, 0, 24:69], torch.arange(N, N + FIRST + MORE))


def test_an_empty_cache_and_an_output_grow_too():
    f = tiny_llama.compiled(keep_ratio=0.4)
    cache = StaticCache(config=f.config, max_cache_len=N)
    grow(cache, MORE)
    out = f.generate(
        tiny_llama.prompt(N), **as_argument(cache), max_new_tokens=MORE, do_sample=False, return_dict_in_generate=True
    )
    zipvl_compile.grow(out, 3)
    assert cache.layers[0].max_cache_len == N + MORE + 3


def test_what_cannot_grow_says_so_and_stays():
    f = tiny_llama.model()
    with pytest.raises(TypeError, match="expected a StaticCache or an output that holds one, got Tensor"):
        grow(torch.ones(1), 3)
    with pytest.raises(ValueError, match="expected layers of fixed size, got none"):
        grow(DynamicCache(config=f.config), 3)
    cache = StaticCache(config=f.config, max_cache_len=N)
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="tokens: expected an integer of at least 1, got"):
            grow(cache, bad)
    sliding = tiny_models.model("gemma3")
    config = sliding.config.get_text_config()
    short = StaticCache(config=config, max_cache_len=config.sliding_window - 1)
    with pytest.raises(ValueError, match="expected a sliding window in layer 0"):
        grow(short, 5)
    assert {layer.max_cache_len for layer in short.layers} == {config.sliding_window - 1}
    long = StaticCache(config=config, max_cache_len=config.sliding_window + 9)
    grow(long, 5)
    assert {layer.max_cache_len for layer in long.layers} == {config.sliding_window, config.sliding_window + 14}
