"""`zipvl_compile.compile`: the module that generates is compiled in place, whichever it is."""

import logging

import pytest
import torch
from families.run import generate, prompts
from support.tiny_models import compiled, inputs, model
from torch import nn

import zipvl_compile
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.compiling import generating_modules
from zipvl_compile.report.compile_report import collect

EVERY_LENGTH = {"inner": "eager", "min_tokens": 0}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "path"), [("blip_2", "language_model"), ("instructblip", "language_model"), ("kosmos_2", "text_model")]
)
def test_the_inner_model_of_a_model_that_hands_over_is_compiled(family, path, caplog):
    f, eager = model(family), model(family)
    with caplog.at_level(logging.INFO, "zipvl_compile"):
        assert zipvl_compile.compile(f, tau=1.0, **EVERY_LENGTH) == [path]
    assert f"zipvl compiles {type(f).__name__}.{path}" in caplog.text
    assert f._compiled_call_impl is None and f.get_submodule(path)._compiled_call_impl is not None
    for x in prompts(family).values():
        assert torch.equal(f.generate(**x, max_new_tokens=6), eager.generate(**x, max_new_tokens=6))


def test_its_cache_is_compacted():
    f = model("kosmos_2")
    zipvl_compile.compile(f, tau=0.8, **EVERY_LENGTH)
    with collect() as reports:
        f.generate(**inputs("kosmos_2"), max_new_tokens=6)
    assert {site.kind for report in reports for site in report.rewritten} == {"prefill", "decode"}


def test_on_a_model_that_generates_it_equals_model_compile():
    f, same = model("llava"), compiled("llava", tau=0.8)
    assert zipvl_compile.compile(f, tau=0.8, **EVERY_LENGTH) == [""]
    out, expected = (generate(m, inputs("llava")) for m in (f, same))
    assert torch.equal(out.sequences, expected.sequences)
    for a, b in zip(cache_of(out).layers, cache_of(expected).layers, strict=True):
        assert torch.equal(a.positions, b.positions) and a.positions.shape[2] < a.prompt_length


def test_a_wrapped_model_is_compiled_inside():
    f = model("llava")
    assert zipvl_compile.compile(torch.compile(f, backend="eager"), **EVERY_LENGTH) == [""]
    assert f._compiled_call_impl is not None


def test_a_bad_option_compiles_nothing():
    f = model("llava")
    with pytest.raises(ValueError, match=r"'tua'.*Did you mean 'tau'"):
        zipvl_compile.compile(f, tua=1.0)
    assert f._compiled_call_impl is None


def test_what_is_no_module_is_named():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        zipvl_compile.compile("llava-hf/llava-1.5-7b-hf")


class Inner(nn.Module):
    def generate(self, x):
        return x


class Outer(nn.Module):
    def __init__(self, **inner):
        super().__init__()
        for name, module in inner.items():
            setattr(self, name, module)

    def generate(self, x):
        first = self.thinker.generate(x)
        return self.talker.generate(first) + self.tokenizer.generate(x)


def test_several_inner_models_and_inner_models_of_inner_models_are_found():
    both = Outer(thinker=Inner(), talker=Outer(thinker=Inner(), talker=Inner(), tokenizer=None), tokenizer=object())
    assert generating_modules(both) == ["thinker", "talker.thinker", "talker.talker"]


def test_a_generate_without_source_is_the_models_own():
    kind = type("Odd", (nn.Module,), {"generate": staticmethod(len)})
    assert generating_modules(kind()) == [""]
