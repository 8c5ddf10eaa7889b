"""Static caches in every family: as growing ones, and as the stock model where nothing is dropped."""

import pytest
import torch
from support.tiny_models import FAMILIES, compiled, inputs, model

from zipvl_compile.cache.compact_static_layer import CompactStaticLayer
from zipvl_compile.cache.hf_names import cache_of

pytestmark = [pytest.mark.slow, pytest.mark.models]
NEW = 6


def tokens(f, x, **how):
    return f.generate(**x, max_new_tokens=NEW, do_sample=False, **how)


@pytest.mark.parametrize("family", [name for name, kind in FAMILIES.items() if kind.generates])
def test_every_family_decodes_over_a_static_cache(family):
    torch._dynamo.reset()
    x = inputs(family)
    try:
        stock = tokens(model(family), x, cache_implementation="static", return_dict_in_generate=True)
    except Exception as error:
        pytest.skip(f"transformers itself does not: {type(error).__name__}: {str(error)[:100]}")
    cache = getattr(cache_of(stock), "self_attention_cache", cache_of(stock))
    ours = any(isinstance(layer, CompactStaticLayer) for layer in cache.layers)
    # Gemma 4's image tokens do not see each other over transformers' own static cache; over ours they do.
    expected = tokens(model(family), x) if ours else stock.sequences
    f = compiled(family, tau=1.0)
    assert torch.equal(tokens(f, x, cache_implementation="static"), expected)
    if not ours:
        return
    torch._dynamo.reset()
    f = compiled(family, policy="paper", tau=0.7)
    assert torch.equal(tokens(f, x, cache_implementation="static"), tokens(f, x))
