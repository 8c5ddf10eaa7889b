"""Static caches in every family: as growing ones, and as the stock model where nothing is dropped."""

import pytest
import torch
from support.tiny_models import FAMILIES, compiled, inputs, model

pytestmark = [pytest.mark.slow, pytest.mark.models]
NEW = 6


def tokens(f, x, **how):
    return f.generate(**x, max_new_tokens=NEW, do_sample=False, **how)


@pytest.mark.parametrize("family", [name for name, kind in FAMILIES.items() if kind.generates])
def test_every_family_decodes_over_a_static_cache(family):
    torch._dynamo.reset()
    x = inputs(family)
    try:
        tokens(model(family), x, cache_implementation="static")
    except Exception as error:
        pytest.skip(f"transformers itself does not: {type(error).__name__}: {str(error)[:100]}")
    f = compiled(family, tau=1.0)
    # Not those of the stock model over a static cache: Gemma 4's image tokens do not see each other there.
    assert torch.equal(tokens(f, x, cache_implementation="static"), tokens(model(family), x))
    torch._dynamo.reset()
    f = compiled(family, policy="paper", tau=0.7)
    assert torch.equal(tokens(f, x, cache_implementation="static"), tokens(f, x))
