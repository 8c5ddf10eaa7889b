"""What both compacted layers do alike: samples are chosen of every tensor that has them, buffers move and come back."""

import pytest
import torch
from support import tiny_llama
from transformers import DynamicCache, StaticCache

from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.compact_static_layer import CompactStaticLayer
from zipvl_compile.cache.hf_names import as_argument
from zipvl_compile.cache.two_buffers import TwoBuffers

MADE = {
    CompactLayer: lambda config: DynamicCache(config=config),
    CompactStaticLayer: lambda config: StaticCache(config=config, max_cache_len=64),
}


@pytest.fixture(params=MADE, ids=lambda kind: kind.__name__)
def layer(request):
    torch._dynamo.reset()
    f = tiny_llama.compiled(keep_ratio=0.5)
    cache = MADE[request.param](f.config)
    with torch.no_grad():
        f(input_ids=tiny_llama.prompt(40, batch=3), use_cache=True, logits_to_keep=1, **as_argument(cache))
    assert type(cache.layers[0]) is request.param and isinstance(cache.layers[0], TwoBuffers)
    return cache.layers[0]


def test_samples_are_chosen_of_every_tensor(layer):
    before = [x.clone() for x in (layer.key_buffer, layer.value_buffer, layer.positions)]
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    after = (layer.key_buffer, layer.value_buffer, layer.positions)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, old[[2, 0]])


def test_buffers_move_and_come_back(layer):
    keys, values = layer.keys.clone(), layer.values.clone()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values) and keys.shape[2] == 20


@pytest.mark.parametrize("kind", MADE)
def test_an_empty_layer_has_nothing_to_choose_or_to_move(kind):
    empty = MADE[kind](tiny_llama.model().config).layers[0]
    empty.reorder_cache(torch.tensor([0]))
    empty.batch_repeat_interleave(2)
    empty.offload()
    empty.prefetch()
    assert not empty.is_initialized and int(empty.get_seq_length()) == 0
