"""Training from the first stage to the checkpoint, with a step or two a stage, and taking it up again."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("rich", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm import train as module
from zipvl_compile.demo.tiny_lvlm.questions import KINDS
from zipvl_compile.demo.tiny_lvlm.recipe import RECIPES, Recipe
from zipvl_compile.demo.tiny_lvlm.stages import STAGES
from zipvl_compile.demo.tiny_lvlm.train import train

SHORT = Recipe(
    align_steps=2, align_batch=1, compact_steps=1, compact_batch=1, full_steps=1, full_batch=1, polish_steps=1,
    questions_per_image=2,
)  # fmt: skip


@pytest.fixture
def few_questions(monkeypatch):
    ask = module.questions_for_demo
    monkeypatch.setattr(module, "questions_for_demo", lambda count, seed, canvas: ask(len(KINDS), seed, canvas=canvas))


def test_every_stage_runs_once_and_its_result_is_a_checkpoint(tmp_path, few_questions, monkeypatch):
    train(tmp_path, SHORT)
    assert {folder.name for folder in (tmp_path / "stages").iterdir()} == set(STAGES)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["recipe"]["align_steps"] == 2 and set(record["minutes_per_stage"]) == set(STAGES)
    assert {*KINDS, "single_token", "multi_token"} <= set(record["held_out_accuracy"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.padding_side == "left"

    # Taken up again, finished stages are not run, and the weights are those of the last one.
    for name in STAGES:
        monkeypatch.setitem(module.STAGES, name, lambda model, recipe: pytest.fail("a finished stage ran again"))
    train(tmp_path, SHORT, resume=True)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_the_command_takes_the_recipe_of_a_canvas(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "train", lambda *given: asked.append(given))
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--canvas", "large", "--seed", "3", "--resume"])
    module.main()
    assert asked == [(tmp_path, replace(RECIPES["large"], seed=3), True)]
    assert asked[0][1].canvas.tokens == 96 * 96
