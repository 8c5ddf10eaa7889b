"""A model of one's own in the demo: a tiny untrained LLaVA, what is said and drawn of it."""

import dataclasses
import io

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from PIL import Image
from rich.console import Console

from zipvl_compile.demo import side_by_side as demo
from zipvl_compile.demo.compare import Answer
from zipvl_compile.demo.media import Video
from zipvl_compile.demo.side_by_side import Setup
from zipvl_compile.passes.cost_model import Machine
from zipvl_compile.report import costs

#: Of which sparse attention pays from the first token on.
FREE = Machine(attend=1e-6, edge=1e-9, multiply=0.0, score=0.0, token=0.0, byte=0.0, site=0.0)


@pytest.fixture
def console():
    return Console(width=80, record=True, file=io.StringIO())


def test_beside_the_defaults_stands_what_they_do_not_show():
    assert Setup().chosen(left_dense=False) is None
    assert Setup().chosen(left_dense=True) == {"min_tokens": 0}
    assert Setup({"tau": 0.9}).chosen(left_dense=False) == {"tau": 0.9}
    assert Setup({"tau": 0.9}).chosen(left_dense=True) == {"min_tokens": 0, "tau": 0.9}
    assert Setup({"min_tokens": 99}).chosen(left_dense=True) == {"min_tokens": 99}


def test_a_model_of_ones_own_is_measured_and_drawn(folder, picture, tmp_path, monkeypatch, console):
    monkeypatch.setattr(demo, "REPEATS", 2)
    monkeypatch.setattr(costs, "machine", lambda device, dtype: FREE)
    monkeypatch.setattr(costs, "EXPECTED_KEPT", 0.01)  # at 261 tokens a window is much of the prompt
    monkeypatch.setattr(costs, "WORST_LOSS", 9.0)
    setup = Setup(inner="eager", output=tmp_path / "own.png")
    image = Image.open(picture).convert("RGB")
    assert demo.run_custom(console, setup, str(folder), [image], "read all digits :", 3, "cpu") == 0
    said = console.export_text()
    assert "The answers " in said and "Kept prompt tokens of zipvl" in said
    assert "dense, " not in said and "chosen" not in said, "nothing about prompts left dense where none was"
    assert Image.open(tmp_path / "own.png").size[0] > 0


@pytest.mark.parametrize("groups", ["layer", "kv_head"])
def test_the_last_answer_is_drawn_beside_what_dense_took(monkeypatch, console, tmp_path, groups):
    drawn = []
    monkeypatch.setattr(demo, "kept_figure", lambda *given: drawn.append(given))
    monkeypatch.setattr(demo, "save", lambda figure, path: drawn.append(path))
    monkeypatch.setattr(demo, "layout_of", lambda *given: drawn.append(given))
    answer = Answer("four", 7, [torch.tensor([0, 2]), None], 1, None, 30, 40, ["full attention", "sliding window"])
    model, frames = torch.nn.Module(), [Image.new("RGB", (2, 2))]
    model.config = "config"
    answers = {"dense": dataclasses.replace(answer, text="five", kv_used=70), "zipvl": answer}
    setup = Setup({"groups": groups}, output=tmp_path / "x.png")
    video = Video(frames, [0], 1)
    demo.draw(console, setup, model, "processor", {}, ["image"], "how many?", answers, [(0, 1)], [video])
    layout, (_, kept, said, cells), path = drawn
    assert layout == ("config", "processor", {}, ["image"], [frames]) and path == tmp_path / "x.png"
    assert kept.layers is answer.kept and kept.kinds is answer.kinds
    assert (kept.bytes_used, kept.bytes_dense, cells) == (30, 70, [(0, 1)])
    assert said[:3] == ["question: how many?", "dense: five", "zipvl: four"]
    assert any("first head" in line for line in said) == (groups == "kv_head")
    assert "x.png" in console.export_text()


def test_without_a_layer_to_keep_a_part_of_nothing_is_drawn(console, tmp_path):
    answers = {"zipvl": Answer("four", 7, [None], 1, None, 1, 1)}
    demo.draw(console, Setup(output=tmp_path / "x.png"), None, None, {}, [], "how many?", answers)
    assert "no picture" in console.export_text() and not (tmp_path / "x.png").exists()
