"""A prompt that comes in parts, and later turns: selected anew over what is in memory, or said to be whole."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import tiny_llama, tiny_models
from support.selected_anew import Attention, chosen
from support.tiny_llava import compiled, inputs, model, prompt_cache, step
from transformers import DynamicCache, LlamaConfig

import zipvl_compile
from zipvl_compile import explain
from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.report import compile_report

PART = torch.randint(6, 128, (1, 140), generator=torch.Generator().manual_seed(5))
DRAFT = PART[:, :5]
SAID = "a later part of a prompt"


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compile_report, "_warned", set())


OVER = {"a compacted cache": {"tau": 0.7}, "a full cache": {"min_tokens": 100}}


@pytest.mark.parametrize("over", OVER)
def test_a_later_part_is_said_once_and_draft_tokens_are_not(over):
    f = compiled(**OVER[over], reselect_tokens=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for tokens in (DRAFT, PART[:, :6]):  # of one length, then of any
            step(f, tokens, prompt_cache(f, inputs(text=20)))
        assert not any(SAID in str(one.message) for one in said)
        with compile_report.collect() as reports:
            for tokens in (PART, PART[:, :135]):
                step(f, tokens, prompt_cache(f, inputs(text=20)))
        assert sum(SAID in str(one.message) for one in said) == 1
    assert SAID in str(reports[0])


def test_explain_takes_a_cache_and_says_it_of_every_layer():
    f = compiled(tau=0.7)
    cache = prompt_cache(f, inputs(text=20))
    before = copy.deepcopy(cache)
    explanation = explain(
        model(), options={"min_tokens": 0, "tau": 0.7, "reselect_tokens": 0}, input_ids=PART, **as_argument(cache)
    )
    rows = [row for row in explanation.rows if row.note is not None]
    assert len(rows) == 2 and all(row.kind == "decode" and not row.reason for row in rows)
    assert SAID in str(explanation) and explanation.prompt_length == cache.get_seq_length() + PART.shape[1]
    for one, other in zip(cache.layers, before.layers, strict=True):  # the user's cache is as it was
        assert isinstance(one, CompactLayer) and torch.equal(one.key_buffer[:, :, : one.cached_length], other.keys)


FIRST, SECOND, RATIO = 60, 150, 0.5
HALF = {"policy": "paper", "keep_ratio": RATIO}


def parts(batch):
    """Return Q, K and V of two parts, and the masks of both: of the second sample some tokens are padding."""
    generator = torch.Generator().manual_seed(3)
    n = FIRST + SECOND
    q = torch.randn(batch, 4, n, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, 2, n, 16, generator=generator, dtype=torch.float64)
    shown = torch.ones(batch, n, dtype=torch.bool)
    shown[1:, :9] = False
    mask = torch.ones(n, n, dtype=torch.bool).tril() & shown[:, None, None]
    given = [(*(x[:, :, part] for x in (q, k, v)), mask[:, :, part, : part.stop])
             for part in (slice(0, FIRST), slice(FIRST, n))]  # fmt: skip
    return given, shown


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first", ["compacted", "whole"])
def test_the_tokens_of_a_later_part_are_those_of_the_model_written_out(first, batch):
    """Float64: the part sees all that is in memory; then half of that and of the part is kept."""
    (one, two), shown = parts(batch)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    cache, f = DynamicCache(config=config), Attention()
    options = HALF | {"inner": "eager"}
    compiled_f = torch.compile(
        f, backend="zipvl", options=options | {"min_tokens": 0 if first == "compacted" else FIRST + 1}
    )
    with torch.no_grad():
        compiled_f(*one, cache)
        (layer,) = cache.layers
        before, used = layer.cached_positions, layer.cached_length
        keys, values = (x[:, :, :used].clone() for x in (layer.key_buffer, layer.value_buffer))
        assert before.shape[2] == (FIRST // 2 if first == "compacted" else FIRST)
        out = compiled_f(*two, cache)
    new = torch.arange(FIRST, FIRST + SECOND).expand(batch, 1, -1)
    places, keys = torch.cat([before, new], 2), torch.cat([keys, two[1]], 2)
    values, mask = torch.cat([values, two[2]], 2), two[3].expand(batch, -1, -1, -1)
    at = places[:, :, None].expand(-1, -1, SECOND, -1)
    expected = F.scaled_dot_product_attention(two[0], keys, values, attn_mask=mask.gather(3, at), enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    kept = chosen(two[0][:, :, -128:], keys, places[:, 0], shown, -(-keys.shape[2] // 2))
    assert torch.equal(layer.positions[:, 0], places[:, 0].gather(1, kept))
    rows = kept[:, None, :, None].expand(-1, 2, -1, 16)
    assert torch.equal(layer.keys, keys.gather(2, rows)) and torch.equal(layer.values, values.gather(2, rows))
    assert layer.get_seq_length() == FIRST + SECOND and layer.prompt_length == FIRST + SECOND


def turns(f, count, tokens=200):
    """Run a prompt and further turns, of which each ends in a new token; return the cache and how much it held."""
    cache, held = None, []
    with torch.no_grad():
        for turn in range(count):
            ids = tiny_llama.prompt(tokens, seed=turn)
            out = f(input_ids=ids, **({} if cache is None else as_argument(cache)), use_cache=True)
            cache = cache_of(out)
            step(f, out.logits[:, -1:].argmax(-1), cache)
            held.append([layer.cached_length for layer in cache.layers])
    return cache, held


def test_a_conversation_has_a_bounded_cache():
    cache, held = turns(tiny_llama.compiled(keep_ratio=0.4), 6)
    assert all(layer.get_seq_length() == 6 * 201 for layer in cache.layers)
    most = 0.4 * 201 / (1 - 0.4) + 3  # the sum of a geometric series
    assert held[0] == [81, 81] and all(tokens <= most for turn in held for tokens in turn)
    positions = cache.layers[0].cached_positions[0, 0]
    assert (positions.diff() > 0).all() and positions[-1] == 6 * 201 - 1
    assert [kept.shape[2] for kept in zipvl_compile.kept_tokens(cache)] == held[-1]


@pytest.mark.parametrize("options", [{"reselect_tokens": 0}, {"reselect_tokens": 300}, {"evict": "keep"}, {"tau": 1.0}])
def test_what_is_not_asked_for_drops_nothing_of_a_later_part(options):
    budget = {} if "tau" in options else {"keep_ratio": 0.4}
    _, held = turns(tiny_llama.compiled(**budget, **options), 2)
    assert held[1][0] == held[0][0] + 201


def test_every_token_kept_is_the_dense_model_in_every_turn():
    (_, expected), (_, got) = (answers(f) for f in (tiny_llama.model(), tiny_llama.compiled(tau=1.0)))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def answers(f):
    cache, found = None, []
    with torch.no_grad():
        for turn, tokens in enumerate((60, 150, 1, 140, 7)):
            ids = tiny_llama.prompt(tokens, seed=turn)
            out = f(input_ids=ids, **({} if cache is None else as_argument(cache)), use_cache=True)
            cache = cache_of(out)
            found.append(out.logits)
    return cache, found


def test_generate_in_chunks():
    ids = tiny_llama.prompt(400)
    expected = tiny_llama.model().generate(ids, max_new_tokens=6, do_sample=False)
    whole = tiny_llama.compiled(tau=1.0).generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=200)
    assert torch.equal(whole, expected)
    out = tiny_llama.compiled(keep_ratio=0.4).generate(
        ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=200, return_dict_in_generate=True
    )
    assert [layer.cached_length for layer in cache_of(out).layers] == [112 + 5] * 2  # of 80 + 200, and the new ones


def test_settings_of_a_request_reach_a_later_part():
    f = tiny_llama.compiled(keep_ratio=0.4)
    with zipvl_compile.settings(keep_ratio=0.2):
        _, held = turns(f, 2)
    assert held[0] == [41, 41] and held[1] == [50, 50]  # a fifth of 200; of 41 + 200, and the new token


def test_another_question_about_the_same_picture():
    """A long question over the cache of a picture, twice from the same copy."""
    f = compiled(keep_ratio=0.5)
    cache = prompt_cache(f, inputs(text=20))
    one, two = copy.deepcopy(cache), copy.deepcopy(cache)
    first, second = step(f, PART, one).logits, step(f, PART, two).logits
    torch.testing.assert_close(first, second)
    held = [layer.cached_length for layer in cache.layers]
    assert all(layer.cached_length < held[0] + PART.shape[1] for layer in one.layers)
    assert [layer.cached_length for layer in cache.layers] == held


@pytest.mark.parametrize("family", ["mistral4", "gemma3"])
def test_a_later_part_over_latents_and_beside_sliding_windows(family):
    """Exact where every token is kept; else half of what is in memory and of the part is."""
    words = torch.randint(10, 200, (1, 140), generator=torch.Generator().manual_seed(1))
    by_token = {name: make(words) for name, make in tiny_models.FAMILIES[family].by_token.items()}
    found = []
    for f in (tiny_models.model(family), *(tiny_models.compiled(family, **one) for one in ({"tau": 1.0}, HALF))):
        torch._dynamo.reset()
        with torch.no_grad():
            cache = cache_of(f(**tiny_models.inputs(family), use_cache=True))
            found.append((f(input_ids=words, **as_argument(cache), use_cache=True, **by_token).logits, cache))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    first = tiny_models.inputs(family)["input_ids"].shape[1]
    layers = [layer for layer in found[2][1].layers if isinstance(layer, CompactLayer)]
    assert layers and all(layer.get_seq_length() == first + 140 for layer in layers)
    assert all(layer.cached_length == -(-(-(-first // 2) + 140) // 2) for layer in layers)
