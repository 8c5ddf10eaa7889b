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
    assert demo.run_custom(console, setup, str(folder), image, "read all digits :", 3, "cpu") == 0
    said = console.export_text()
    assert "The answers are" in said and "Kept prompt tokens of zipvl" in said
    assert "dense, " not in said and "chosen" not in said, "nothing about prompts left dense where none was"
    assert Image.open(tmp_path / "own.png").size[0] > 0


@pytest.mark.parametrize("grid", [(2, 2), None], ids=["patches", "strips"])
def test_what_is_drawn_depends_on_whether_the_grid_is_known(monkeypatch, console, grid):
    drawn = []
    for name in ("draw_kept_patches", "draw_kept_strips"):
        monkeypatch.setattr(demo, name, lambda *given, name=name: drawn.append((name, given)))
    monkeypatch.setattr(demo, "patch_grid", lambda config, inputs: grid)
    monkeypatch.setattr(demo, "image_positions", lambda config, inputs: torch.arange(1, 5))
    monkeypatch.setattr(demo, "model_view", lambda processor, inputs, image: image)
    answer = Answer("four", 7, [torch.tensor([0, 2]), None], 1, None, 1, 1)
    model = torch.nn.Module()
    model.config = None
    answers = {"dense": dataclasses.replace(answer, text="five"), "zipvl": answer}
    demo.draw(console, Setup(), model, None, {}, Image.new("RGB", (4, 4)), "how many?", answers, [(0, 1)])
    ((name, given),) = drawn
    assert name == ("draw_kept_patches" if grid else "draw_kept_strips")
    assert list(given[2]) == [0], "layers of another kind are left out"
    n, title = given[5:7] if grid else given[3:5]
    assert n == 7 and title == "question: how many?\ndense: five\nzipvl: four"
    assert not grid or given[7] == [(0, 1)]
