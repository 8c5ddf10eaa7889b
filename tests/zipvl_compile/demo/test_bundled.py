"""The bundled model's demo, on a tiny untrained LLaVA in its place: what it says of both models, and when it fails."""

import io

import pytest

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from rich.console import Console

from zipvl_compile.demo import bundled as demo
from zipvl_compile.demo.compare import Answer, Comparison
from zipvl_compile.demo.side_by_side import Setup
from zipvl_compile.demo.tiny_lvlm.evaluate import DemoQuestion


@pytest.fixture
def console():
    return Console(width=80, record=True, file=io.StringIO())


@pytest.mark.parametrize(("options", "code"), [({}, 1), ({"tau": 0.8}, 0)], ids=["defaults", "options"])
def test_different_answers_fail_only_where_nothing_was_asked_for(folder, tmp_path, monkeypatch, console, options, code):
    monkeypatch.setattr(demo, "LARGE_CHECKPOINT", folder)
    monkeypatch.setattr(demo, "LEAST_AGREEMENT", 1.01)
    setup = Setup(options, inner="eager", output=tmp_path / "demo.png")
    assert demo.run_bundled(console, setup, questions=1) == code
    said = " ".join(console.export_text().split())
    assert ("FAILED: 100.0% of the answers agree, at least 101%" in said) == bool(code)
    assert "of 1 answers the same." in said and "10% of the prompt" in said and "as many random" in said
    assert '"inner": "eager"' in said and (tmp_path / "demo.png").exists()
    assert "By default, this prompt stays dense" in said and '"min_tokens": 0' in said


def test_without_the_trained_model_the_remedy_is_named(tmp_path, monkeypatch, console):
    monkeypatch.setattr(demo, "LARGE_CHECKPOINT", tmp_path)
    with pytest.raises(ValueError, match="make train"):
        demo.run_bundled(console, Setup(), 1)


def test_examples_show_differences_first_and_one_of_each_kind():
    def answered(text):
        return Answer(text, 5, [], 1, None, 1, 1)

    kinds = ["count", "count", "colour", "read"]
    asked = [DemoQuestion(None, f"<image> q{i}", "right", kind) for i, kind in enumerate(kinds)]
    dense, sparse = ([answered(text) for text in texts] for texts in ("aaab", "aaac"))
    result = Comparison({"dense": dense, "zipvl": dense, "chosen": sparse})
    rows = demo._examples(asked, result, [False, True, False, False])
    assert rows == [("q3", "right", "b", "b", "c"), ("q1", "right", "a", "a", "a"), ("q2", "right", "a", "a", "a")]
