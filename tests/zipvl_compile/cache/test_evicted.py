"""The tokens that a layer does not keep: where they are stored, and that they are forgotten with the prompt."""

import pytest
import torch
from support import tiny_llama

from zipvl_compile.cache.evicted import EVICTED, forget_others, recalled
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.kernels.quantise_tokens import GROUP

STEP = {"host": 0.0, "quantize": 0.02}  # of 8 bits, the range of these keys over 255


@pytest.fixture(params=["host", "quantize"])
def layers(request):
    """Return a layer that keeps 40% of 100 tokens, that of a full cache, and how far they may be apart."""
    found = []
    for evict in (request.param, "keep"):
        torch._dynamo.reset()
        f = tiny_llama.compiled(keep_ratio=0.4, evict=evict, evict_bits=8)
        with torch.no_grad():
            cache = cache_of(f(input_ids=tiny_llama.prompt(100), use_cache=True))
            f(input_ids=tiny_llama.prompt(3, seed=1), **as_argument(cache))
        found.append(cache.layers[0])
    return *found, STEP[request.param]


def test_every_token_comes_back_in_order(layers):
    layer, full, step = layers
    keys, values = recalled(layer)
    assert keys.shape == (1, 2, 103, 16) and layer.cached_length == 43
    for got, expected in ((keys, full.keys), (values, full.values)):
        exact = torch.cat([layer.positions[0, 0], torch.arange(100, 103)])
        assert torch.equal(got[:, :, exact[:40]], expected[:, :, exact[:40]])
        assert (got - expected).abs()[:, :, :100].max() <= step * 2
        assert step == 0.0 or (got - expected).abs()[:, :, :100].max() > 0


def test_they_take_the_room_of_the_others_alone(layers):
    layer, _, step = layers
    rows = 60 if step == 0.0 else GROUP
    assert layer.other_keys.shape[2] == rows and layer.other_values.shape[2] == rows
    assert (layer.key_scales is None) == (step == 0.0)


@pytest.mark.parametrize("forget", [forget_others, lambda layer: layer.reset()], ids=["forget", "reset"])
def test_they_are_forgotten(layers, forget):
    forget(layers[0])
    assert all(getattr(layers[0], name) is None for name in EVICTED)
