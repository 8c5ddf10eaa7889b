"""How often things compile: three decoder graphs for a generate, and nothing once two prompt lengths were seen."""

from __future__ import annotations

import pytest
import torch
from support.tiny_llava import compiled, inputs, model

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.report.compile_report import collect


def decoder_graphs(reports):
    """Return the kinds of the compiled graphs that hold decoder attention, in order."""
    return [report.rewritten[0].kind for report in reports if report.rewritten]


@pytest.mark.parametrize("options", [{"tau": 0.7}, {"tau": 1.0}, {"keep_ratio": 0.4}], ids=str)
def test_two_decoder_graphs_for_a_generate_and_none_after_warm_up(options):
    torch._dynamo.reset()
    f = compiled(**options)
    with collect() as first:
        f.generate(**inputs(text=20), max_new_tokens=12, do_sample=False)
    assert decoder_graphs(first) == ["prefill", "decode"]
    with collect() as second:  # another length makes prompt shapes dynamic
        f.generate(**inputs(text=27, seed=1), max_new_tokens=12, do_sample=False)
    assert decoder_graphs(second) == ["prefill"]
    with collect() as later:
        for i in range(20):
            f.generate(**inputs(text=10 + 3 * i, seed=i), max_new_tokens=6, do_sample=False)
    assert later == []


def test_equal_numbers_of_kept_tokens_in_two_layers_do_not_become_a_guard():
    torch._dynamo.reset()
    f = compiled(policy="paper", tau=0.7)
    out = f.generate(**inputs(text=15, seed=1), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    a, b = (layer.positions.shape[2] for layer in cache_of(out).layers)
    assert a == b, "pick a prompt whose layers keep equally many tokens"
    f.generate(**inputs(text=20, seed=2), max_new_tokens=4, do_sample=False)
    with collect() as later:
        counts = set()
        for i in range(8):
            x = inputs(text=20 + i, seed=100 + i)
            out = f.generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            counts.add(tuple(layer.positions.shape[2] for layer in cache_of(out).layers))
    assert any(a != b for a, b in counts)
    assert later == []


def test_growth_of_the_cache_compiles_once_more_and_then_never_again():
    torch._dynamo.reset()
    f = compiled(tau=0.7)
    for text in (20, 27):
        f.generate(**inputs(text=text), max_new_tokens=12, do_sample=False)
    with collect() as growth:
        f.generate(**inputs(text=24), max_new_tokens=40, do_sample=False)
    assert decoder_graphs(growth) == ["decode"]
    with collect() as later:
        f.generate(**inputs(text=31), max_new_tokens=80, do_sample=False)
    assert later == []


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="its CPU Inductor fails on any decode graph of Llama")
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_inductor_generates_what_the_eager_inner_compiler_generates(tau):
    torch._dynamo.reset()
    x = inputs(text=20)
    plain = model() if tau == 1.0 else compiled(tau=tau)
    expected = plain.generate(**x, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    torch._dynamo.reset()
    f = compiled(tau=tau, inner="inductor")
    with collect() as reports:
        out = f.generate(**x, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected.sequences)
    assert decoder_graphs(reports) == ["prefill", "decode"]
    where = [layer.key_buffer.data_ptr() for layer in cache_of(out).layers]
    with torch.no_grad():
        f(input_ids=torch.tensor([[9]]), **as_argument(cache_of(out)))
    assert [layer.key_buffer.data_ptr() for layer in cache_of(out).layers] == where  # no copy of the cache
