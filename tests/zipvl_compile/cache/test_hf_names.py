"""The KV cache has one name, that of the transformers installed, and nobody uses the other."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path

import pytest
import torch
from support.source_tree import ROOT
from support.tiny_llava import inputs, model
from transformers import DynamicCache, LlamaForCausalLM

from zipvl_compile.cache.hf_names import CACHE_NAME, CACHE_NAMES, as_argument, cache_of

OLD = CACHE_NAMES[1]
THIS, HOME = (str(Path(__file__).relative_to(ROOT)), "zipvl_compile/cache/hf_names.py")


def test_the_name_is_that_of_the_models_installed():
    declared = inspect.signature(LlamaForCausalLM.forward).parameters
    assert [name for name in CACHE_NAMES if name in declared] == [CACHE_NAME]


def test_a_loop_warns_of_nothing(caplog):
    f = model()
    with warnings.catch_warnings(), torch.no_grad(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        out = f(**inputs(), use_cache=True)
        n = cache_of(out).get_seq_length()
        out = f(input_ids=torch.tensor([[9]]), **as_argument(cache_of(out)))
        out = f(input_ids=torch.tensor([[9]]), **as_argument(cache_of(out), f.forward))
    assert cache_of(out).get_seq_length() == n + 2 and OLD not in caplog.text


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_what_a_forward_declares_wins(name):
    cache, spaces = DynamicCache(), {}
    exec(f"def forward(self, input_ids, {name}=None, **kwargs): pass", spaces)
    assert as_argument(cache, spaces["forward"]) == {name: cache}
    assert as_argument(cache, lambda input_ids, **kwargs: None) == as_argument(cache) == {CACHE_NAME: cache}


@pytest.mark.parametrize("output", [None, (), torch.ones(1), {CACHE_NAME: DynamicCache()}])
def test_an_output_without_a_cache_has_none(output):
    assert cache_of(output) is None


def test_without_use_cache_there_is_none():
    with torch.no_grad():
        assert cache_of(model()(**inputs(), use_cache=False)) is None


def test_the_older_name_stands_in_one_file():
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    files += (path for path in (ROOT / "zipvl_compile").rglob("*.py"))
    found = {str(path.relative_to(ROOT)) for path in files if OLD in path.read_text()}
    assert found - {THIS} == {HOME}


def test_the_readme_says_both():
    loop = next(line for line in (ROOT / "README.md").read_text().splitlines() if "input_ids=next_token" in line)
    assert all(f"{name}=out.{name}" in loop for name in CACHE_NAMES)
