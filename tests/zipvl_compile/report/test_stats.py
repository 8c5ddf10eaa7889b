"""stats: tokens and bytes of a cache, by hand."""

import logging

import pytest
import torch
from support import tiny_llama
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import compiled
from transformers import StaticCache

import zipvl_compile
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.report.stats import NOT_COMPACTED, stats

N, ROW = 40, 2 * 2 * 16 * 4  # a token of a layer: K and V, KV heads, head_dim, fp32


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


def test_bytes_and_tokens_by_hand():
    model = compiled(keep_ratio=0.25)
    out = model(tiny_llama.prompt(N), use_cache=True, logits_to_keep=1)
    found = zipvl_compile.stats(out)
    for layer in found.layers:
        assert (layer.prompt_length, layer.kept, layer.tokens, layer.length) == (N, 10, 10, N)
        assert (layer.bytes_used, layer.bytes_freed) == (10 * ROW, 30 * ROW)
        assert layer.bytes_allocated >= layer.bytes_used + 10 * 8 and layer.share == 0.25 and not layer.why_dense
    assert (found.bytes_used, found.bytes_freed) == (20 * ROW, 60 * ROW)
    assert found.bytes_peak == (N + 10) * ROW, "one layer is whole, the other one is compacted"
    assert f"at most {50 * ROW:,} at once" in str(found)
    assert str(found).startswith(f"zipvl: KV cache of 2 layers: 25.0% of {80 * ROW:,} bytes in use")
    assert f"layer 1: 10 of 40 prompt tokens (25.0%), {10 * ROW:,} bytes in use" in str(found)

    cache = cache_of(out)
    for i in range(3):
        model(tiny_llama.prompt(1, seed=i), use_cache=True, **as_argument(cache))
    later = stats(cache).layers[0]
    assert (later.kept, later.tokens, later.length) == (10, 13, N + 3)
    assert (later.bytes_used, later.bytes_freed) == (13 * ROW, 30 * ROW)
    model(tiny_llama.prompt(147, seed=5), use_cache=True, **as_argument(cache))
    assert [layer.tokens for layer in stats(cache).layers] == [40, 40], "a quarter of 13 + 147"
    assert stats(cache).bytes_peak == (160 + 40) * ROW


def test_a_prompt_in_parts_has_a_bounded_peak():
    ids = tiny_llama.prompt(1600)
    whole, parts = (
        stats(
            compiled(keep_ratio=0.25).generate(
                ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, **how
            )
        )
        for how in ({}, {"prefill_chunk_size": 200})
    )
    assert whole.bytes_peak == (1600 + 401) * ROW
    assert parts.bytes_peak <= (200 / 0.75 + 10 + 200 * 0.25 / 0.75 + 10) * ROW


def test_layers_that_were_not_compacted_say_so():
    dense = stats(tiny_llama.model()(tiny_llama.prompt(N), use_cache=True))
    assert [layer.why_dense for layer in dense.layers] == [NOT_COMPACTED] * 2
    assert (dense.bytes_used, dense.bytes_allocated, dense.bytes_freed) == (2 * N * ROW, 2 * N * ROW, 0)
    every = stats(compiled(tau=1.0)(tiny_llama.prompt(N), use_cache=True, logits_to_keep=1))
    assert all("every token is kept" in layer.why_dense for layer in every.layers) and every.bytes_freed == 0
    model = tiny_llama.model()
    static = StaticCache(config=model.config, max_cache_len=64)
    model(tiny_llama.prompt(N), use_cache=True, **as_argument(static))
    assert [(layer.why_dense, layer.tokens) for layer in stats(static).layers] == [(NOT_COMPACTED, N)] * 2
    assert stats(static).bytes_used == 2 * N * ROW and stats(static).bytes_allocated >= 2 * 64 * ROW


def test_what_generate_returns():
    model = compiled(keep_ratio=0.5)
    out = model.generate(tiny_llama.prompt(N), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert [layer.kept for layer in stats(out).layers] == [20, 20]


def test_something_without_a_cache():
    with pytest.raises(TypeError, match=r"expected a cache of transformers.*got Tensor\. Call the model"):
        stats(torch.ones(2))


def test_one_line_a_prompt_where_the_log_wants_it(caplog):
    model = compiled(keep_ratio=0.25)
    with caplog.at_level(logging.INFO, "zipvl_compile"):
        model.generate(tiny_llama.prompt(N), max_new_tokens=4, do_sample=False)
    lines = [record.getMessage() for record in caplog.records if "prompt of" in record.getMessage()]
    assert lines == ["zipvl: prompt of 40 tokens: 2 layers keep 25.0% of it (25.0% to 25.0%)"]
