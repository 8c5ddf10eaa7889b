"""Attention switches of transformers: what zipvl reads is rewritten; the rest stays dense and says what helps."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import peft
import pytest
import torch
from support import fake_flash, tiny_llama, tiny_llava
from support.quiet import nothing_compiled_or_said  # noqa: F401

import zipvl_compile
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.report.compile_report import collect

OPTIONS = {"min_tokens": 0, "inner": "eager", "keep_ratio": 0.5}
REMEDY = "call model.set_attn_implementation('sdpa')"


@pytest.fixture
def flash(monkeypatch):
    return fake_flash.install(monkeypatch)


def switched(switch, tiny=tiny_llama, **changes):
    f = tiny.model(**changes)
    f.set_attn_implementation(switch)
    return f


def generated(f, x, new=4):
    return f.generate(**x, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)


def compiled(f, **options):
    f.compile(backend="zipvl", options=OPTIONS | options)
    return f


def sites(reports, kind):
    return [site for report in reports for site in report.sites if site.kind == kind]


def kept(out):
    return [positions.tolist() for positions in zipvl_compile.kept_tokens(out)]


PROMPT = {"input_ids": tiny_llama.prompt()}


def test_eager_attention_keeps_what_sdpa_keeps_and_changes_with_the_switch():
    expected = generated(compiled(tiny_llama.model()), PROMPT)
    f = compiled(switched("eager"))
    for switch in ("eager", "sdpa", "eager"):
        f.set_attn_implementation(switch)
        with collect() as reports:
            out = generated(f, PROMPT)
        assert torch.equal(out.sequences, expected.sequences) and kept(out) == kept(expected)
        assert all(site.rewritten for report in reports for site in report.sites)
    assert reports == [], "the code of the first switch serves again"


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (2, f"the cached keys are read by {fake_flash.OPERATOR}: {REMEDY}"),
        (1, f"cache update and the attention, as attn_implementation='{fake_flash.NAME}' may make one: {REMEDY}"),
    ],
    ids=["one graph", "broken by the look at packed sequences"],
)
def test_flash_functions_stay_dense_and_say_what_helps(flash, batch, reason):
    x = {"input_ids": tiny_llama.prompt(batch=batch)}
    f = switched(flash).bfloat16()
    expected = generated(f, x).sequences
    with collect() as reports, pytest.warns(UserWarning, match="zipvl leaves") as warned:
        out = generated(compiled(f), x)
    assert torch.equal(out.sequences, expected)
    found = sites(reports, "prefill")
    assert len(found) == 2 and all(str(site.reason).endswith(reason) for site in found)
    assert sum(reason in str(one.message) for one in warned) == 1
    assert all(reason in row.detail for row in zipvl_compile.explain(f, **x).rows if row.kind == "prefill")


def test_flash_functions_with_padding_stay_right(flash):
    x = tiny_llava.inputs(batch=2, text=20, pad=5)
    expected = generated(tiny_llava.model(), x, new=3).sequences
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = generated(compiled(switched(flash, tiny_llava)), x, new=3)
    assert torch.equal(out.sequences, expected)
    assert all(len(positions[0][0]) == cache_of(out).get_seq_length() for positions in kept(out))


def test_flex_attention_stays_dense_and_says_what_helps():
    f = switched("flex_attention", num_hidden_layers=1)
    expected = generated(tiny_llama.model(num_hidden_layers=1), PROMPT, new=2).sequences
    with collect() as reports, pytest.warns(UserWarning, match="mask_mod") as warned:
        out = generated(compiled(f), PROMPT, new=2)
    assert torch.equal(out.sequences, expected)
    (prefill,), (decode,) = sites(reports, "prefill"), sites(reports, "decode")
    assert "FlexAttention" in str(prefill.reason) and str(prefill.reason).endswith(REMEDY)
    assert decode.by_design and "holds every token" in str(decode.reason)
    assert len([one for one in warned if "zipvl leaves" in str(one.message)]) == 1


@pytest.mark.parametrize("switch", [fake_flash.NAME, "flex_attention"])
def test_a_compacted_cache_is_refused_to_attention_that_is_not_read(flash, switch):
    f = compiled(tiny_llama.model())
    cache = cache_of(f(**PROMPT, use_cache=True))
    token = {"input_ids": torch.tensor([[9]])}
    again = f(**token, **as_argument(copy.deepcopy(cache))).logits
    f.set_attn_implementation(switch)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="tried to read it as a full cache"):
        warnings.simplefilter("ignore")
        f(**token, **as_argument(copy.deepcopy(cache)))
    f.set_attn_implementation("sdpa")
    assert torch.equal(f(**token, **as_argument(cache)).logits, again)


@pytest.mark.parametrize("wrap", [False, True], ids=["model", "peft"])
def test_compile_sets_the_switch_of_every_part(flash, wrap):
    f, x = switched(flash, tiny_llava), tiny_llava.inputs(text=20)
    inner, expected = f, generated(compiled(tiny_llava.model()), x)
    if wrap:
        f = peft.get_peft_model(f, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    zipvl_compile.compile(f, attention="sdpa", **OPTIONS)
    parts = (inner.config, inner.config.text_config, inner.config.vision_config)
    assert [config._attn_implementation for config in parts] == ["sdpa"] * 3
    out = generated(f, x)
    assert torch.equal(out.sequences, expected.sequences) and kept(out) == kept(expected)


@pytest.mark.parametrize(
    ("switch", "package"),
    [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface"),
     ("kernels-community/flash-attn2", "kernels")],
)  # fmt: skip
def test_libraries_that_are_not_installed_are_refused_by_transformers(switch, package):
    found = importlib.util.find_spec(package)
    if found is not None and found.origin is not None:  # the folder `kernels` of this repository has none
        pytest.skip(f"{package} is installed")
    f = compiled(tiny_llama.model())
    with pytest.raises(ImportError):
        f.set_attn_implementation(switch)
    assert len(kept(f(**PROMPT, use_cache=True))[0][0][0]) == 20, "what was set before goes on"


def test_paged_switches():
    """transformers makes no mask for "paged|eager" outside of continuous batching: as wrong there as without zipvl."""
    f = switched("paged|eager")
    expected = generated(f, PROMPT).sequences
    with collect() as reports, pytest.warns(UserWarning, match="load the model with 'sdpa'"):
        assert torch.equal(generated(compiled(f), PROMPT).sequences, expected)
    assert not any(report.rewritten for report in reports)
    with pytest.raises(ValueError, match="sdpa_paged"):
        switched("sdpa_paged")
