"""A prompt that is too short to gain is as without zipvl: the same tokens, the same cache, and it is said."""

import copy
import warnings

import pytest
import torch
from support.tiny_llava import compiled, inputs, model, prompt_cache, step

import zipvl_compile
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.passes import keep_every_token
from zipvl_compile.passes.match.reasons import Why
from zipvl_compile.report import compile_report
from zipvl_compile.report.compile_report import collect

NEW = 6


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compile_report, "_warned", set())


def generated(f, x, **how):
    return f.generate(**x, **{"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True} | how)


def allocated(cache):
    return [tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "lookup"]
)
def test_tokens_and_cache_are_those_of_the_stock_model(how):
    x = inputs(batch=1, text=20)
    got, expected = generated(compiled(min_tokens=None), x, **how), generated(model(), x, **how)
    assert torch.equal(got.sequences, expected.sequences)
    ours, stock = cache_of(got), cache_of(expected)
    assert allocated(ours) == allocated(stock) and ours.get_seq_length() == stock.get_seq_length()
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_every_position_is_kept():
    x = inputs(batch=2, text=20, pad=4)
    n = x["input_ids"].shape[1]
    for positions in zipvl_compile.kept_tokens(prompt_cache(compiled(min_tokens=None), x)):
        assert torch.equal(positions, torch.arange(n).repeat(2, 1, 1))


def test_one_line_says_so_once():
    f = compiled(min_tokens=500)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for text in (20, 30):
            generated(f, inputs(text=text))
    said = [str(one.message) for one in said if "zipvl" in str(one.message)]
    assert len(said) == 1 and "stays dense, as all of fewer than 500 tokens do" in said[0] and "min_tokens" in said[0]


def test_a_longer_prompt_is_compacted_by_the_same_model_and_back():
    f, least = compiled(min_tokens=100, tau=0.8), 100
    for text in (20, 60, 25, 70):
        x = inputs(text=text)
        cache, n = prompt_cache(f, x), x["input_ids"].shape[1]
        kept = [positions.shape[2] for positions in zipvl_compile.kept_tokens(cache)]
        assert all(count == n for count in kept) if n < least else all(count < n for count in kept)
        token = torch.tensor([[9]])
        assert step(f, token, cache).logits.isfinite().all() and cache.get_seq_length() == n + 1


def test_an_uncompiled_model_goes_on_with_it():
    x, token = inputs(text=20), torch.tensor([[9]])
    cache = prompt_cache(compiled(min_tokens=None), x)
    stock = prompt_cache(model(), x)
    torch.testing.assert_close(step(model(), token, copy.deepcopy(cache)).logits, step(model(), token, stock).logits)


def test_explain_says_dense_and_from_where_not():
    shown = zipvl_compile.explain(model(), **inputs(text=20))
    assert not shown.rewritten
    decode = [row for row in shown.rows if row.kind == "decode"]
    assert len(decode) == 2 and all(row.reason.why is Why.FULL_CACHE and row.by_design for row in decode)
    least = next(row.reason.min_tokens for row in shown.rows if row.kind == "prefill")
    assert any(f"stays dense, as all of fewer than {least} tokens do" in note for note in shown.notes)
    assert any(note.startswith("Speed of ") and "machines.json" in note for note in shown.notes)


def test_explain_of_a_chosen_length_names_no_machine():
    shown = zipvl_compile.explain(model(), options={"min_tokens": 500}, **inputs(text=20))
    assert not any("Speed of" in note for note in shown.notes) and any("500" in note for note in shown.notes)


def test_keeping_everything_is_said_to_gain_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generated(compiled(min_tokens=None, tau=1.0), inputs(text=20))
    assert any("gains no time at any length" in str(one.message) for one in said)


def test_a_long_dense_prompt_has_bounded_room(monkeypatch):
    monkeypatch.setattr(keep_every_token, "LEAST", 50)
    x = inputs(text=20)
    f, n = compiled(min_tokens=1000), x["input_ids"].shape[1]
    with collect() as reports:
        got = generated(f, x)
    assert torch.equal(got.sequences, generated(model(), x).sequences)
    layer = cache_of(got).layers[0]
    assert layer.positions.shape[2] == n and n + NEW - 1 <= layer.key_buffer.shape[2] <= n + 32
    assert any(site.rewritten for report in reports for site in report.sites if site.kind == "decode")
