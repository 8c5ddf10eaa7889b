"""The checkpoints that are shipped."""

import json
import warnings
from dataclasses import asdict

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm import CHECKPOINT, LARGE_CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.build import build_config, word_ids
from zipvl_compile.demo.tiny_lvlm.canvas import LARGE, SMALL, canvas_of
from zipvl_compile.demo.tiny_lvlm.evaluate import exact_match, questions_for_demo
from zipvl_compile.demo.tiny_lvlm.questions import EOS
from zipvl_compile.demo.tiny_lvlm.recipe import RECIPES


@pytest.mark.parametrize(("folder", "canvas"), [(CHECKPOINT, SMALL), (LARGE_CHECKPOINT, LARGE)], ids=["small", "large"])
def test_checkpoint_loads_without_warnings(capfd, folder, canvas):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
    printed = "".join(capfd.readouterr())
    assert not any(
        word in printed.lower() for word in ("warning", "missing", "unexpected", "deprecated", "newly initialized")
    )
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads
    assert not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == word_ids(canvas)[EOS]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    assert model.config.to_dict().keys() == build_config(canvas).to_dict().keys() and canvas_of(model.config) == canvas
    recorded = json.loads((folder / "training.json").read_text())["recipe"]
    expected = json.loads(json.dumps(asdict(RECIPES[canvas.name])))
    shared = recorded.keys() & expected.keys()  # some were named otherwise when the small one was trained
    assert len(shared) > 12 and [recorded[name] for name in shared] == [expected[name] for name in shared]


def test_processor_expands_the_image(processor):
    question = next(questions_for_demo(1, seed=0))
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    assert (inputs["input_ids"] == word_ids(SMALL)["<image>"]).sum() == SMALL.tokens >= 256
    assert inputs["input_ids"][0, 0] == word_ids(SMALL)["<bos>"]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == question.prompt.removeprefix(
        "<image> "
    )


def test_readme_example(model, processor):
    question = next(questions_for_demo(1, seed=0, kinds=["colour_to_digit"]))
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8)
    assert output[0, -1] == word_ids(SMALL)[EOS]
    assert exact_match(
        processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), question.answer
    )
