"""Caches that zipvl does not compact: the tokens of the stock model, and reasons that are true."""

import warnings

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from zipvl_compile.passes.match.reasons import Why
from zipvl_compile.report import compile_report
from zipvl_compile.report.compile_report import collect

NEW, WINDOW = 6, 16


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compile_report, "_warned", set())


def built(windows=False):
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    made = (
        MistralForCausalLM(MistralConfig(**sizes, sliding_window=WINDOW))
        if windows
        else LlamaForCausalLM(LlamaConfig(**sizes))
    )
    made.generation_config.eos_token_id = None
    return made.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def both(n=40, windows=False, steps=NEW, stock=None, **how):
    """Return the tokens of the compiled and of the stock model, the reasons of what stayed dense, and the warnings."""
    how = {"max_new_tokens": steps, "do_sample": False} | how
    ids = torch.randint(6, 64, (1, n), generator=torch.Generator().manual_seed(0))
    expected = built(windows).generate(ids.to(built().device), **how | (stock or {}))
    f = built(windows)
    f.compile(backend="zipvl", options={"min_tokens": 0, "inner": "eager"})
    with collect() as reports, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = f.generate(ids.to(f.device), **how)
    sites = [site for report in reports for site in report.sites]
    assert not any(site.rewritten for site in sites)
    reasons = {(site.kind, site.reason.why): str(site.reason) for site in sites}
    return got, expected, reasons, [str(one.message) for one in said if "zipvl leaves" in str(one.message)]


def test_a_static_cache_that_is_full_before_the_first_compiled_call_is_named():
    """A prompt in chunks: transformers makes the tensors of full length beforehand."""
    got, expected, reasons, said = both(cache_implementation="static", prefill_chunk_size=16)
    assert torch.equal(got, expected)
    assert {why for _, why in reasons} == {Why.STATIC_CACHE}
    assert len(said) == 1 and "prefill_chunk_size" in said[0] and "graph break" not in said[0]


def test_generate_does_not_compile_a_second_time_what_is_compiled_for_zipvl():
    ids = torch.randint(6, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    f = built()
    ids = ids.to(f.device)
    f.compile(backend="zipvl", options={"min_tokens": 0, "inner": "eager", "keep_ratio": 0.5})
    how = {"max_new_tokens": NEW, "do_sample": False}
    expected = f.generate(ids, **how)
    config = CompileConfig(backend="a backend that is not there")
    config._compile_all_devices = True  # as on a GPU
    got = f.generate(ids, **how, cache_implementation="static", compile_config=config)
    assert torch.equal(got, expected)


def test_a_compile_config_for_zipvl_compiles_decode_steps_alone_and_drops_nothing():
    ids = torch.randint(6, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    f = built()
    how = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
    expected = built().generate(ids.to(f.device), **how)
    config = CompileConfig(backend="zipvl", mode=None, fullgraph=False, options={"inner": "eager", "keep_ratio": 0.5})
    config._compile_all_devices = True  # as on a GPU
    with collect() as reports, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = f.generate(ids.to(f.device), **how, compile_config=config)
    assert torch.equal(got, expected)
    assert {(site.kind, site.reason.why) for report in reports for site in report.sites} == {
        ("decode", Why.STATIC_CACHE)
    }
    assert any("run the prompt through the compiled model" in str(one.message) for one in said)


@pytest.mark.parametrize("n", [8, 40], ids=["short", "long"])
def test_sliding_windows_are_left_alone_without_a_warning(n):
    got, expected, reasons, said = both(n, windows=True, steps=12)
    assert torch.equal(got, expected)
    assert {why for _, why in reasons} == {Why.SLIDING_WINDOW} and not said


@pytest.mark.parametrize("n", [8, 40], ids=["short", "long"])
def test_static_windows_are_windows_or_static(n):
    got, expected, reasons, _ = both(n, windows=True, steps=12, cache_implementation="static")
    assert torch.equal(got, expected)
    assert {kind for kind, _ in reasons} == {"prefill", "decode"}
    assert {why for _, why in reasons} <= {Why.SLIDING_WINDOW, Why.STATIC_CACHE}


def test_a_quantized_cache_is_named():
    pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
    how = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    got, expected, reasons, said = both(**how)
    assert torch.equal(got, expected)
    assert ("decode", Why.FOREIGN_CACHE) in reasons and Why.NO_CACHE not in {why for _, why in reasons}
    assert any("quantized" in line for line in said)


def test_without_a_cache_it_is_neither_a_vision_tower_nor_a_cache():
    got, expected, reasons, said = both(use_cache=False)
    assert torch.equal(got, expected)
    assert set(reasons) == {("other", Why.NO_CACHE)} and not said
    assert all("use_cache=False" in text and "vision tower" not in text for text in reasons.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="stock transformers offloads to the CPU from a GPU only")
def test_an_offloaded_cache_is_compacted_and_right():
    ids = torch.randint(6, 64, (1, 40), generator=torch.Generator().manual_seed(0)).cuda()
    f, how = built(), {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "offloaded"}
    f.compile(backend="zipvl", options={"min_tokens": 0, "tau": 1.0, "inner": "eager"})
    assert torch.equal(f.generate(ids, **how), built().generate(ids, **how))


def test_tuples_instead_of_outputs():
    f, ids = built(), torch.randint(6, 64, (1, 40), generator=torch.Generator().manual_seed(0)).to(built().device)
    f.compile(backend="zipvl", options={"min_tokens": 0, "tau": 1.0, "inner": "eager"})
    with torch.no_grad():
        got, expected = (m(input_ids=ids, use_cache=True, return_dict=False) for m in (f, built()))
    assert isinstance(got, tuple)
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].get_seq_length() == expected[1].get_seq_length() == 40
