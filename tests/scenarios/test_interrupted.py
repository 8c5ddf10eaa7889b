"""A forward that is interrupted: the next call on its cache is right, or an error that names it."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_llava import compiled, inputs, prompt_cache, step

from zipvl_compile.cache.uneven import UnevenCacheError

TOKEN = torch.tensor([[9]])
trouble: list[Exception] = []


@torch.library.custom_op("zipvl_tests::may_fail", mutates_args=())
def may_fail(x: torch.Tensor) -> torch.Tensor:
    if trouble:
        raise trouble.pop()
    return x.clone()


may_fail.register_fake(torch.empty_like)


def failing_in_the_last_layer(**options):
    """Return a compiled model whose last MLP fails when `trouble` says so."""
    model = compiled(**options)
    mlp = model.model.language_model.layers[-1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: may_fail(forward(x))
    return model


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("a kernel failed")], ids=str)
def test_an_interrupted_step_is_undone_and_can_be_tried_again(error):
    f = failing_in_the_last_layer(tau=0.7)
    cache = prompt_cache(f, inputs(text=20))
    for _ in range(2):  # the graph of any length, too
        n, other = cache.get_seq_length(), copy.deepcopy(cache)
        expected = step(f, TOKEN, other).logits
        trouble.append(error)
        with pytest.raises(type(error), match=str(error)):
            step(f, TOKEN, cache)
        assert {layer.get_seq_length() for layer in cache.layers} == {n}
        assert torch.equal(step(f, TOKEN, cache).logits, expected)


def test_an_interrupted_prompt_leaves_an_empty_cache():
    f = failing_in_the_last_layer(tau=0.7)
    x = inputs(text=20)
    expected = f.generate(**x, max_new_tokens=3, do_sample=False)
    trouble.append(RuntimeError("a kernel failed"))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        f.generate(**x, max_new_tokens=3, do_sample=False)
    assert torch.equal(f.generate(**x, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("warm", [0, 3], ids=["first step", "graph of any length"])
def test_a_cache_whose_layers_are_not_equally_long_is_refused_with_the_remedy(warm):
    f = compiled(tau=0.7)
    cache = prompt_cache(f, inputs(text=20))
    for _ in range(warm):
        step(f, TOKEN, cache)
    n, good = cache.get_seq_length(), copy.deepcopy(cache)
    cache.layers[0].update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))  # as an eager forward that failed
    for _ in range(2):
        with pytest.raises(UnevenCacheError, match=rf"got {n + 2} in .*layers\.0.* and {n + 1} in .*layers\.1.*crop"):
            step(f, TOKEN, cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [n + 1, n]
    for layer in cache.layers:
        layer.crop(n - layer.get_seq_length())
    assert torch.equal(step(f, TOKEN, cache).logits, step(f, TOKEN, good).logits)
