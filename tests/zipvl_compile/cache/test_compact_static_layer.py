"""The static layer by itself: transformers' own until zipvl compiles a prompt; the scenarios are test_static_decode."""

import pytest
import torch
from support import tiny_llama
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

import zipvl_compile
from zipvl_compile.cache.compact_static_layer import CompactStaticLayer
from zipvl_compile.cache.hf_names import as_argument


def tokens(m, seed=0):
    return torch.randn(2, 1, 2, m, 4, generator=torch.Generator().manual_seed(seed)).unbind(0)


def test_it_is_the_static_layer_of_transformers_until_then():
    ours, stock = CompactStaticLayer(16), StaticLayer(16)
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3) and ours.get_seq_length() == 0
    for m in (5, 1, 3):
        k, v = tokens(m, m)
        for got, expected in zip(ours.update(k, v), stock.update(k, v), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(1) == stock.get_mask_sizes(1) == (16, 0)
    ours.crop(-2)
    stock.crop(-2)
    assert ours.get_seq_length() == 7 and torch.equal(ours.keys, stock.keys)
    assert ours.is_compileable and ours.positions is None and ours.holds_every_token
    assert torch.equal(ours.cached_positions, torch.arange(7)[None, None])
    ours.reset()
    stock.reset()
    assert torch.equal(ours.keys, stock.keys) and int(ours.get_seq_length()) == 0


def test_every_static_cache_has_it():
    cache = StaticCache(config=tiny_llama.model().config, max_cache_len=16)
    assert {type(layer) for layer in cache.layers} == {CompactStaticLayer}
    assert all(layer.max_cache_len == 16 for layer in cache.layers)


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_written():
    layer = CompactStaticLayer(4)
    with pytest.raises(ValueError, match="expected a prompt of at most 4 tokens"):
        layer.update(*tokens(5))
    assert not layer.is_initialized


def test_a_copy_writes_into_tensors_of_its_own():
    layer = CompactStaticLayer(8)
    layer.update(*tokens(3))
    other = layer.__copy__()
    other.update(*tokens(2, 1))
    assert int(layer.get_seq_length()) == 3 and int(other.get_seq_length()) == 5
    assert not layer.keys[:, :, 3:].any()


def test_buffers_move_to_the_host_and_back():
    torch._dynamo.reset()
    f = tiny_llama.compiled(keep_ratio=0.5)
    cache = StaticCache(config=f.config, max_cache_len=64)
    with torch.no_grad():
        f(input_ids=tiny_llama.prompt(40), use_cache=True, logits_to_keep=1, **as_argument(cache))
    layer = cache.layers[0]
    before = layer.keys.clone()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, before) and layer.keys.shape[2] == 20
    assert [kept.shape[2] for kept in zipvl_compile.kept_tokens(cache)] == [20, 20]
