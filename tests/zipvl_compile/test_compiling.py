"""`zipvl_compile.compile`: the module that generates is compiled in place, whichever it is."""

import logging

import pytest
import torch
from families.run import generate, prompts
from support.tiny_models import compiled, inputs, model
from torch import nn
from transformers import GenerationMixin

import zipvl_compile
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.compiling import generating_modules, length_asked_of_generate, uncompiled_generate
from zipvl_compile.dynamo import in_place_for_zipvl
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
        assert zipvl_compile.compile(f, tau=1.0, **EVERY_LENGTH) == ["", path]
    assert f"zipvl compiles {type(f).__name__}.{path}" in caplog.text
    assert in_place_for_zipvl(f) and in_place_for_zipvl(f.get_submodule(path))
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
    assert in_place_for_zipvl(f)


def test_a_bad_option_compiles_nothing():
    f = model("llava")
    with pytest.raises(ValueError, match=r"'tua'.*Did you mean 'tau'"):
        zipvl_compile.compile(f, tua=1.0)
    assert not in_place_for_zipvl(f)


def test_what_is_no_module_is_named():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        zipvl_compile.compile("llava-hf/llava-1.5-7b-hf")


def test_a_path_names_the_only_module_to_compile():
    f = model("blip_2")
    assert zipvl_compile.compile(f, path="language_model") == ["language_model"]
    assert not in_place_for_zipvl(f) and in_place_for_zipvl(f.language_model)
    assert zipvl_compile.compile(f, path="") == [""] and in_place_for_zipvl(f)


def test_a_path_that_leads_nowhere_is_named():
    f = model("llava")
    with pytest.raises(ValueError, match=r"path: expected a module of LlavaFor\w+, got 'lm'\. Use one of the names"):
        zipvl_compile.compile(f, path="lm")
    assert not in_place_for_zipvl(f)


class Inner(nn.Module, GenerationMixin):
    """Generates as Hugging Face's models do."""


class Outer(nn.Module, GenerationMixin):
    """Generates by its inner models."""

    def __init__(self, **inner):
        super().__init__()
        for name, module in inner.items():
            setattr(self, name, module)

    def generate(self, x):
        return self.thinker.generate(x)


class Loop(nn.Module):
    """Generates by a loop of its own."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def generate(self, x):
        return self.step(x)


def test_several_inner_models_and_inner_models_of_inner_models_are_found():
    talker = Outer(thinker=Inner(), part=nn.Sequential(Inner()))
    both = Outer(thinker=Inner(), talker=talker, tokenizer=object(), twin=talker)
    assert generating_modules(both) == ["", "thinker", "talker", "talker.thinker", "talker.part.0"]


def test_what_a_model_calls_that_generates_itself_is_a_part_of_it():
    f = Inner()
    f.text_model, f.other = Inner(), Outer(thinker=Inner())
    assert generating_modules(f) == [""]
    assert generating_modules(Loop(f)) == ["step"]


def test_a_generate_that_was_replaced_on_the_object_may_run_anything():
    f = Inner()
    f.text_model = Inner()
    f.generate = f.text_model.generate
    assert generating_modules(f) == ["", "text_model"]


def test_a_model_that_cannot_generate_is_compiled_itself():
    assert generating_modules(nn.Linear(2, 2)) == [""]


@pytest.mark.parametrize("f", [Loop(nn.Linear(2, 2)), Loop(None)], ids=["decoder", "none"])
def test_a_generate_in_which_nothing_is_known_is_an_error_that_asks_for_the_path(f):
    with pytest.raises(ValueError, match=r'path: expected where Loop\.generate calls a model.*Pass path=""'):
        zipvl_compile.compile(f)
    assert zipvl_compile.compile(f, path="") == [""]


class Runs(nn.Module, GenerationMixin):
    """Fills no cache, but asks what a cache asks."""

    def generate(self):
        return self()

    def forward(self):
        self.told = None if torch.compiler.is_compiling() else uncompiled_generate()


class HandsOver(nn.Module):
    def __init__(self):
        super().__init__()
        self.runs = Runs()

    def generate(self):
        self.runs.generate()
        return self.runs.told

    def forward(self):
        raise AssertionError("never called")


def test_a_generate_that_runs_another_model_than_the_compiled_one_is_named_once():
    f = HandsOver()
    assert f.generate() is None, "nothing is compiled"
    f = HandsOver()
    f.compile(backend="eager")
    assert f.generate() is None, "compiled, but for another backend"
    f = HandsOver()
    f.compile(backend="zipvl")
    assert "HandsOver.generate runs a Runs that is not compiled" in f.generate()
    assert f.generate() is None
    f = HandsOver()
    assert zipvl_compile.compile(f) == ["runs"]
    assert f.generate() is None


def test_generate_of_a_wrapper_is_named_once():
    f = Runs()
    wrapped = torch.compile(f, backend="zipvl")
    wrapped.generate()
    assert 'Use model.compile(backend="zipvl")' in f.told
    wrapped.generate()
    assert f.told is None


def _prepare_static_cache(max_cache_len, made, before=1, **local):
    """Ask as transformers' function of this name does, with its local variables."""
    effective_length = max(max_cache_len, before)
    if local:
        cache = local  # of the decoder's own tokens; the next is for an encoder's
        return length_asked_of_generate(made), effective_length, cache
    return length_asked_of_generate(made), effective_length


@pytest.mark.parametrize(
    ("asked", "made", "before", "expected"),
    [(40, 40, 1, 40), (40, 900, 900, 40), (900, 900, 40, 900), (40, 33, 900, 33)],
)
def test_a_static_cache_is_as_long_as_this_generate_needs_it(asked, made, before, expected):
    assert _prepare_static_cache(asked, made, before)[0] == expected


def test_a_cache_of_an_encoders_tokens_and_one_of_ones_own_are_as_long_as_they_are_made():
    assert _prepare_static_cache(40, 900, 900, decoder=True)[0] == 900
    assert length_asked_of_generate(900) == 900
