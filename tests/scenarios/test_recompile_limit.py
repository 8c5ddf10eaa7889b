"""PyTorch's recompile limit: raised for zipvl's calls only, and past it no code of another call is taken for theirs."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from support import tiny_llama

import zipvl_compile.backend as module
from zipvl_compile.cache import eager_fallback
from zipvl_compile.cache.hf_names import as_argument, cache_of

OPTIONS = {"min_tokens": 0, "inner": "eager"}
LIMIT = torch._dynamo.config.recompile_limit


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    module._warn_of_other_code.cache_clear()
    with torch.no_grad():
        yield
    assert torch._dynamo.config.recompile_limit == LIMIT


def kept(out) -> int:
    """Return how many prompt tokens the first layer kept."""
    layer = cache_of(out).layers[0]
    return layer.get_seq_length() if layer.positions is None else layer.positions.shape[2]


def compiled(f, backend="zipvl", **options):
    return torch.compile(f, backend=backend, **({"options": OPTIONS | options} if backend == "zipvl" else {}))


class Scaled(torch.nn.Module):
    """Compiles anew for every name, a constant of the traced code."""

    def forward(self, x):
        return x * int(self.name)


def count_compiles(backend, **options):
    """Call one code object with 20 different constants, and return how many of them were compiled."""
    stats, model, x = torch._dynamo.utils.counters["stats"], Scaled(), torch.ones(3)
    f = compiled(model, backend, **options)
    before = stats["unique_graphs"]
    for by in range(20):
        model.name = str(by)
        assert torch.equal(f(x), x * by)
    return stats["unique_graphs"] - before


def test_the_limit_is_raised_for_zipvl_and_for_nobody_else():
    assert count_compiles("eager") == LIMIT == 8
    torch._dynamo.reset()
    assert count_compiles("zipvl") == 20
    assert torch._dynamo.config.recompile_limit == LIMIT
    torch._dynamo.reset()
    assert count_compiles("eager") == LIMIT


def test_the_limit_is_raised_in_other_threads_too():
    counts = []
    thread = threading.Thread(target=lambda: counts.append(count_compiles("zipvl")))
    thread.start()
    thread.join()
    assert counts == [20]


def test_a_limit_that_the_user_set_stays():
    with torch._dynamo.config.patch(recompile_limit=3):
        assert count_compiles("zipvl") == 3


def test_compiles_of_another_call_do_not_use_up_the_limit_before_the_first_of_this_one():
    """All calls of one code object share their entries."""
    assert count_compiles("zipvl", tau=1.0) == 20
    assert count_compiles("zipvl", tau=0.6) == 20


def past_the_limit(model, backend, **options):
    """Return a compiled function that calls the model, and that PyTorch compiles no more."""

    def ask(x, name, **cache):  # compiles anew for every name
        return model(input_ids=x, use_cache=True, **cache) if name else None

    f = compiled(ask, backend, **options)
    with torch._dynamo.config.patch(recompile_limit=1):
        f(tiny_llama.prompt(2), "compiled")
        f(tiny_llama.prompt(2), "over the limit")
    return lambda x, **cache: f(x, "anything", **cache)


@pytest.mark.parametrize("other", [("zipvl", {"tau": 1.0}), ("eager", {})], ids=["zipvl", "eager"])
def test_past_the_limit_a_prompt_does_not_run_by_the_options_of_another_call(other):
    model, x = tiny_llama.model(), tiny_llama.prompt()
    expected, sparse, f = model(input_ids=x), compiled(model, tau=0.6), past_the_limit(model, other[0], **other[1])
    assert kept(sparse(input_ids=x, use_cache=True)) < x.shape[1]
    with pytest.warns(UserWarning, match=r"reached its recompile limit.*zipvl_compile\.compile"):
        out = f(x)
    assert kept(out) == x.shape[1]
    torch.testing.assert_close(out.logits, expected.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert torch.equal(f(x).logits, out.logits)


def test_past_the_limit_a_later_part_over_a_compacted_cache_runs_by_the_options_that_compacted_it():
    """No dense code could read that cache."""
    model = tiny_llama.model()
    first, part = tiny_llama.prompt(200), tiny_llama.prompt(150, seed=1)
    sparse = compiled(model, keep_ratio=0.5)
    caches = [cache_of(sparse(input_ids=first, use_cache=True)) for _ in range(2)]
    expected = sparse(input_ids=part, use_cache=True, **as_argument(caches[0]))
    out = past_the_limit(model, "zipvl", tau=1.0)(part, **as_argument(caches[1]))
    assert kept(out) == kept(expected) == 125 and torch.equal(out.logits, expected.logits)


def test_past_the_limit_code_of_an_equal_call_is_used():
    model, x = tiny_llama.model(), tiny_llama.prompt()
    sparse, f = compiled(model, tau=0.6), past_the_limit(model, "zipvl", tau=0.6)
    expected = sparse(input_ids=x, use_cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = f(x)
    assert kept(out) == kept(expected) < x.shape[1] and torch.equal(out.logits, expected.logits)


def test_past_the_limit_a_prompt_that_runs_uncompiled_is_said_once():
    eager_fallback.warn_of_uncompiled_prompt.cache_clear()
    model, x = tiny_llama.model(), tiny_llama.prompt()
    expected = model(input_ids=x)
    with pytest.warns(UserWarning, match=r"read uncompiled.*recompile limit.*zipvl_compile\.compile") as said:
        f = past_the_limit(model, "zipvl", tau=0.6)
        out = f(x)
    assert sum("read uncompiled" in str(one.message) for one in said) == 1
    assert kept(out) == x.shape[1] and torch.equal(out.logits, expected.logits)
