"""A prompt alone is processed with the pictures of the prompt and its answer, so that one begins the other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from zipvl_compile.demo.tiny_lvlm.build import build_processor
from zipvl_compile.demo.tiny_lvlm.canvas import SMALL
from zipvl_compile.lmms.pictures import same_pictures

Image = pytest.importorskip("PIL.Image")
PROMPT = "<image> what digit is red ?"


def test_the_prompt_begins_prompt_and_answer():
    processor = build_processor()
    lm = SimpleNamespace(_image_processor=processor)
    with same_pictures(lm):
        inside = lm._image_processor
        assert inside.tokenizer is processor.tokenizer
        whole = inside(text=[f"{PROMPT} 7"], images=[Image.new("RGB", (SMALL.size, SMALL.size))], return_tensors="pt")
        alone = inside(text=[PROMPT], return_tensors="pt")
    n = alone["input_ids"].shape[1]
    assert n > SMALL.tokens and whole["input_ids"][:, :n].equal(alone["input_ids"])
    assert processor.tokenizer.decode(whole["input_ids"][0, n:]) == "7"
    assert lm._image_processor is processor
    with pytest.raises(ValueError, match="no images were passed"):  # else the detour could go
        processor(text=[PROMPT], return_tensors="pt")


def test_models_without_such_a_processor_stay_as_they_are():
    lm = SimpleNamespace(_image_processor=print)
    with same_pictures(lm):
        assert lm._image_processor is print
    with same_pictures(SimpleNamespace()):
        pass
