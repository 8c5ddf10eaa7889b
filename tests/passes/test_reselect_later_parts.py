"""Which layers drop tokens of a later part over a compacted cache, and why the others do not."""

import pytest
import torch
from support import tiny_llama
from support.tiny_llava import step

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.passes import reselect_later_parts
from zipvl_compile.passes.match import reasons
from zipvl_compile.per_request import only_in
from zipvl_compile.report.compile_report import collect

PART = tiny_llama.prompt(160, seed=1)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def second(**options):
    """Return how many tokens each layer drops of a later part, and the notes of its attention."""
    f = tiny_llama.compiled(keep_ratio=0.5, **options)
    with torch.no_grad(), collect() as reports:
        cache = cache_of(f(input_ids=tiny_llama.prompt(200), use_cache=True))
        before = [layer.cached_length for layer in cache.layers]
        step(f, PART, cache)
    sites = [site for report in reports for site in report.sites if site.kind == "decode"]
    assert all(site.rewritten for site in sites)
    dropped = [old + 160 - layer.cached_length for old, layer in zip(before, cache.layers, strict=True)]
    return dropped, [site.note for site in sites]


def test_every_layer_selects_anew():
    assert second() == ([130, 130], [None, None])


@pytest.mark.parametrize("least", [161, 0])
def test_a_part_that_is_too_short_is_kept_whole(least):
    assert second(reselect_tokens=least) == ([0, 0], [reasons.LATER_PART] * 2)


def test_heads_with_tokens_of_their_own_are_kept_whole():
    assert second(groups="kv_head") == ([0, 0], [reselect_later_parts.HEADS] * 2)


def test_a_dense_layer_is_kept_whole():
    """The cache of the first one is plain, so that only the other reads a compacted one."""
    assert second(dense_layers=[0]) == ([0, 130], [None])


def test_nothing_is_said_where_nothing_should_be_dropped():
    assert second(evict="keep") == ([0, 0], [None, None])


def test_layers_of_both_kinds_of_caches_have_budgets_of_their_own():
    """The first layer holds every token of the first part, the second one half; of the later part only one selects."""
    left = tiny_llama.compiled(keep_ratio=0.5, dense_layers=[0])
    for selecting, expected in (([0], [180, 100 + 160]), ([1], [360, 130]), ([0, 1], [180, 130])):
        torch._dynamo.reset()
        with torch.no_grad():
            cache = cache_of(left(input_ids=tiny_llama.prompt(200), use_cache=True))
            assert [layer.cached_length for layer in cache.layers] == [200, 100]
            f = tiny_llama.compiled(keep_ratio=0.5)
            with only_in(selecting):
                step(f, PART, cache)
        assert [layer.cached_length for layer in cache.layers] == expected
