"""What a layer stores of a later part before any pass looks at it: everything, as a prompt is stored."""

import pytest
import torch
from support.tiny_llava import inputs, prompt_cache, shared

from zipvl_compile.cache.buffers import spare_tokens
from zipvl_compile.cache.later_parts import compact_again, continued
from zipvl_compile.passes.match.attention_site import PART_TOKENS


@pytest.fixture
def layer():
    return prompt_cache(shared(tau=0.6), inputs(text=30)).layers[0]


def test_a_compacted_layer_keeps_what_is_in_memory(layer):
    k, v = torch.randn(2, 1, 2, 5, 16).unbind()
    n, kept = layer.get_seq_length(), layer.positions.clone()
    layer._append(k, v)
    used, expected = layer.cached_length, layer.cached_positions
    keys = layer.key_buffer[:, :, :used].clone()
    compact_again(layer)
    assert torch.equal(layer.positions, expected) and layer.cached_length == used
    assert layer.prompt_length == layer.get_seq_length() == n + 5
    assert torch.equal(layer.key_buffer[:, :, :used], keys) and layer.key_buffer.shape[2] == used + spare_tokens(n + 5)
    assert torch.equal(layer.positions[:, :, :-5], kept) and torch.equal(layer.value_buffer[:, :, used - 5 : used], v)


def test_a_layer_that_holds_every_token_continues_them():
    layer = prompt_cache(shared(min_tokens=1000), inputs(text=30)).layers[0]
    k, v = torch.randn(2, 1, 2, PART_TOKENS, 16).unbind()
    keys, values = continued(layer, k, v)
    assert keys.shape[2] == layer.get_seq_length() + PART_TOKENS == values.shape[2]
    assert torch.equal(keys[:, :, -PART_TOKENS:], k) and torch.equal(values[:, :, -PART_TOKENS:], v)
