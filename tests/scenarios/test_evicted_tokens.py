"""`evict="host"` and `"quantize"`: the other tokens wait in host memory, or are read at few bits; none is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from support import tiny_llama, tiny_models
from support.cache_copies import stored_and_loaded
from transformers import DynamicCache

import zipvl_compile
from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.evicted import EVICTED, recalled
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.kernels.other_tokens import other_tokens
from zipvl_compile.report import compile_report

HALF = {"keep_ratio": 0.4, "evict": "host"}
CODED = {"keep_ratio": 0.4, "evict": "quantize"}
FIRST, SECOND = 160, 140


@pytest.fixture(autouse=True)
def from_the_start():
    torch._dynamo.reset()


def read(f, ids, cache=None, **others):
    with torch.no_grad():
        return f(input_ids=ids, **({} if cache is None else as_argument(cache)), use_cache=True, **others)


def conversation(f, batch=1):
    """Return logits of a prompt, two new tokens and a later turn, and the cache."""
    mask = torch.ones(batch, FIRST, dtype=torch.long)
    mask[1:, :11] = 0
    found, cache = [], None
    for turn, tokens in enumerate((FIRST, 1, 1, SECOND)):
        shown = torch.cat([mask, torch.ones(batch, sum((FIRST, 1, 1, SECOND)[1 : turn + 1]), dtype=torch.long)], 1)
        out = read(f, tiny_llama.prompt(tokens, batch, seed=turn), cache, attention_mask=shown)
        cache = cache_of(out)
        found.append(out.logits)
    return found, cache


@pytest.mark.parametrize(("batch", "inner"), [(1, "eager"), (2, "eager"), (2, "inductor")])
def test_a_later_turn_reads_what_a_full_cache_holds(batch, inner):
    """As with `evict="keep"`, but for the two tokens between, which see the kept ones alone; so they are left out."""
    f, full = (tiny_llama.compiled(keep_ratio=0.4, evict=evict, inner=inner) for evict in ("host", "keep"))
    mask = torch.ones(batch, FIRST + SECOND, dtype=torch.long)
    mask[1:, :11] = 0
    first, second = tiny_llama.prompt(FIRST, batch), tiny_llama.prompt(SECOND, batch, seed=1)
    found = []
    for model in (f, full):
        cache = cache_of(read(model, first, attention_mask=mask[:, :FIRST]))
        found.append((read(model, second, cache, attention_mask=mask).logits, cache))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for layer, whole in zip(found[0][1].layers, found[1][1].layers, strict=True):
        assert whole.holds_every_token and layer.positions.shape[2] == 120  # of 300
        others = other_tokens(layer.positions, 300)
        rows = others[..., None].expand(-1, 2, -1, 16)
        keys = whole.keys.gather(2, rows)
        torch.testing.assert_close(layer.other_keys, keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.other_values, whole.values.gather(2, rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_that_a_turn_dropped_come_back(batch):
    f = tiny_llama.compiled(**HALF)
    cache = cache_of(read(f, tiny_llama.prompt(FIRST, batch)))
    before = cache.layers[1].positions[0, 0].tolist()
    _, after = None, cache_of(read(f, tiny_llama.prompt(SECOND, batch, seed=1), cache)).layers[1].positions[0, 0]
    old = [token for token in after.tolist() if token < FIRST]
    assert not {*old} <= {*before}
    drop = tiny_llama.compiled(keep_ratio=0.4)
    cache = cache_of(read(drop, tiny_llama.prompt(FIRST, batch)))
    before = cache.layers[1].positions[0, 0].tolist()
    after = cache_of(read(drop, tiny_llama.prompt(SECOND, batch, seed=1), cache)).layers[1].positions[0, 0]
    assert {token for token in after.tolist() if token < FIRST} <= {*before}


@pytest.mark.parametrize("evict", ["host", "quantize"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_conversation_is_exact_where_every_token_is_kept(evict, batch):
    got, _ = conversation(tiny_llama.compiled(tau=1.0, evict=evict), batch)
    expected, _ = conversation(tiny_llama.model(), batch)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[:, -1], b[:, -1], rtol=1e-4, atol=1e-4)


def with_codes(full, coded):
    """Return a full cache, its other tokens replaced by what the codes of another one say."""
    for layer, source in zip(full.layers, coded.layers, strict=True):
        keys, values = recalled(source)
        layer.key_buffer[:, :, : layer.cached_length] = keys
        layer.value_buffer[:, :, : layer.cached_length] = values
    return full


@pytest.mark.parametrize(
    ("batch", "inner", "bits"),
    [*((batch, "eager", bits) for batch in (1, 2) for bits in (8, 4, 2)), (2, "inductor", 4)],
)
def test_decoding_reads_kept_tokens_and_codes_in_one_softmax(batch, inner, bits):
    """As the model over a full cache whose other tokens are what the codes say; a later turn reads them, too."""
    f, full = (
        tiny_llama.compiled(keep_ratio=0.4, evict=evict, evict_bits=bits, inner=inner) for evict in ("quantize", "keep")
    )
    steps = (1, 1, 3, SECOND)
    mask = torch.ones(batch, FIRST + sum(steps), dtype=torch.long)
    mask[1:, :11] = 0
    first = tiny_llama.prompt(FIRST, batch)
    one, other = (cache_of(read(m, first, attention_mask=mask[:, :FIRST])) for m in (f, full))
    assert all(layer.positions.shape[2] == 64 for layer in one.layers)
    other, n, exact = with_codes(other, one), FIRST, copy.deepcopy(other)
    for turn, tokens in enumerate(steps, 1):
        n += tokens
        ids = tiny_llama.prompt(tokens, batch, seed=turn)
        got, expected = (read(m, ids, c, attention_mask=mask[:, :n]).logits for m, c in ((f, one), (full, other)))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        if turn == 1:
            away = (got - read(full, ids, exact, attention_mask=mask[:, :n]).logits).abs().max().item()
            assert 0 < away < {8: 0.1, 4: 2.0, 2: 10.0}[bits]
    assert all(layer.positions.shape[2] == 122 for layer in one.layers)  # 40% of all 305


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_uncompiled_code_reads_the_codes_too(batch, tokens):
    f = tiny_llama.compiled(**CODED)
    mask = torch.ones(batch, FIRST + tokens, dtype=torch.long)
    mask[1:, :11] = 0
    cache = cache_of(read(f, tiny_llama.prompt(FIRST, batch), attention_mask=mask[:, :FIRST]))
    ids, other = tiny_llama.prompt(tokens, batch, seed=1), copy.deepcopy(cache)
    expected = read(f, ids, cache, attention_mask=mask).logits
    torch.testing.assert_close(
        read(tiny_llama.model(), ids, other, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4
    )


def test_codes_move_with_the_buffers():
    f = tiny_llama.compiled(**CODED)
    layer = cache_of(read(f, tiny_llama.prompt(FIRST))).layers[0]
    assert {*layer.moving} == {"key_buffer", "value_buffer", *EVICTED}
    layer.offload()
    layer.prefetch()
    assert layer.other_keys.dtype == torch.uint8
    host = cache_of(read(tiny_llama.compiled(**HALF), tiny_llama.prompt(FIRST))).layers[0]
    assert {*host.moving} == {"key_buffer", "value_buffer"}, "what waits on the host stays there"


def test_fewer_bits_take_less_room_and_stats_say_so():
    stats = {}
    for options in ({"evict": "drop"}, *({"evict": "quantize", "evict_bits": bits} for bits in (2, 4, 8))):
        torch._dynamo.reset()
        cache = cache_of(read(tiny_llama.compiled(keep_ratio=0.2, **options), tiny_llama.prompt(320)))
        stats[options.get("evict_bits", 0)] = zipvl_compile.stats(cache)
    element, numbers = 4, 2 * 2 * 2 * 16  # bytes; of a token: layers, K and V, heads, head_dim
    assert stats[0].bytes_used == 64 * numbers * element and stats[0].bytes_freed == 256 * numbers * element
    for bits in (2, 4, 8):
        scales = 2 * 2 * (4 * 16 + 256) * 2 * element  # layers, heads, a pair for 64 tokens of a channel, for a token
        codes = 256 * numbers * bits // 8
        assert stats[bits].bytes_used == 64 * numbers * element + codes + scales
        assert stats[bits].bytes_freed == 256 * numbers * element - codes - scales
        assert f"others at {bits} bits" in str(stats[bits])


def test_stats_tell_the_host_from_the_device():
    cache = cache_of(read(tiny_llama.compiled(keep_ratio=0.2, evict="host"), tiny_llama.prompt(320)))
    stats = zipvl_compile.stats(cache)
    assert stats.bytes_used == 64 * 128 * 4 and stats.bytes_freed == stats.bytes_on_host == 256 * 128 * 4
    assert "131,072 on the host" in str(stats)


def test_latents_and_odd_heads_stay_whole_and_say_why():
    f = tiny_models.compiled("mistral4", **CODED)
    with torch.no_grad(), compile_report.collect() as reports:
        cache = cache_of(f(**tiny_models.inputs("mistral4"), use_cache=True))
    assert all(layer.holds_every_token for layer in cache.layers if isinstance(layer, CompactLayer))
    assert any("evict='quantize' over a cache of latents" in str(report) for report in reports)
    torch._dynamo.reset()
    f = tiny_llama.compiled({"head_dim": 18}, **CODED, evict_bits=2)
    with compile_report.collect() as reports:
        cache = cache_of(read(f, tiny_llama.prompt(FIRST)))
    assert all(layer.holds_every_token for layer in cache.layers)
    assert "evict_bits=2 and a head_dim of 18, which 4 does not divide" in str(reports[0])


def selected(cache):
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    return cache


CHANGES = {"deepcopy": copy.deepcopy, "fork": zipvl_compile.fork, "pickle": stored_and_loaded, "samples": selected}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [HALF, CODED], ids=["host", "quantize"])
def test_what_is_elsewhere_goes_with_the_cache(options, change):
    f = tiny_llama.compiled(**options)
    cache = cache_of(read(f, tiny_llama.prompt(FIRST, 2)))
    second = tiny_llama.prompt(SECOND, 2, seed=1)
    other = CHANGES[change](copy.deepcopy(cache))
    for ids in (second[:, :1], second):
        torch.testing.assert_close(read(f, ids, other).logits, read(f, ids, cache).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [50, 120])
@pytest.mark.parametrize("options", [HALF, CODED | {"evict_bits": 8}], ids=["host", "quantize"])
def test_crop_into_the_prompt_and_on(options, cut):
    """The tokens that waited stay those of the prompt that is left, however many groups of codes that leaves."""
    found = []
    for given in (options, {"keep_ratio": 0.4, "evict": "keep"}):
        f = tiny_llama.compiled(**given)
        cache = cache_of(read(f, tiny_llama.prompt(FIRST)))
        cache.crop(-cut)
        assert cache.get_seq_length() == FIRST - cut
        if options["evict"] == "quantize":
            read(f, tiny_llama.prompt(1, seed=2), cache)
        found.append(read(f, tiny_llama.prompt(SECOND, seed=1), cache).logits)
    close = 1e-4 if options["evict"] == "host" else 0.1
    torch.testing.assert_close(*found, rtol=close, atol=close)


def test_a_short_turn_sees_the_kept_tokens_alone():
    f, drop = tiny_llama.compiled(**HALF, reselect_tokens=200), tiny_llama.compiled(keep_ratio=0.4, reselect_tokens=0)
    for tokens in (1, 20, SECOND):
        found = []
        for model in (f, drop):
            cache = cache_of(read(model, tiny_llama.prompt(FIRST)))
            found.append(read(model, tiny_llama.prompt(tokens, seed=1), cache).logits)
            assert all(layer.cached_length == 64 + tokens for layer in cache.layers)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [HALF, CODED], ids=["host", "quantize"])
def test_a_pair_of_keys_and_values_is_no_whole_cache(options):
    f = tiny_llama.compiled(**options)
    cache = cache_of(read(f, tiny_llama.prompt(FIRST)))
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    with pytest.raises(ValueError, match="the others apart from them"):
        DynamicCache(pairs, config=f.config)


def test_a_prompt_that_stays_dense_leaves_nothing_on_the_host():
    f = tiny_llama.compiled(**HALF | {"min_tokens": 500})
    cache = cache_of(read(f, tiny_llama.prompt(FIRST)))
    assert all(layer.other_keys is None and layer.holds_every_token for layer in cache.layers)
    said = read(f, tiny_llama.prompt(3, seed=1), cache).logits
    torch.testing.assert_close(said, dense_after(FIRST, 3), rtol=1e-4, atol=1e-4)


def dense_after(first, second):
    model = tiny_llama.model()
    cache = cache_of(read(model, tiny_llama.prompt(first)))
    return read(model, tiny_llama.prompt(second, seed=1), cache).logits


@pytest.mark.parametrize("family", ["mistral4", "gemma3"])
def test_over_latents_and_beside_sliding_windows(family):
    """Keys are computed from all latents, those from the host too; layers with a window are as they were."""
    words = torch.randint(10, 200, (1, 140), generator=torch.Generator().manual_seed(1))
    by_token = {name: make(words) for name, make in tiny_models.FAMILIES[family].by_token.items()}
    found = []
    for evict in ("host", "keep"):
        torch._dynamo.reset()
        f = tiny_models.compiled(family, policy="paper", keep_ratio=0.5, evict=evict)
        with torch.no_grad():
            cache = cache_of(f(**tiny_models.inputs(family), use_cache=True))
            found.append((f(input_ids=words, **as_argument(cache), use_cache=True, **by_token).logits, cache))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    layers = [layer for layer in found[0][1].layers if isinstance(layer, CompactLayer)]
    n = layers[0].get_seq_length()
    assert all(layer.cached_length == -(-n // 2) for layer in layers)
