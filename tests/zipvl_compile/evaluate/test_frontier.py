"""`zipvl eval` from end to end: the bundled model, a model of one's own, and what is missing."""

import csv
import importlib.util
import io
import json

import pytest

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[cli]'")
pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from PIL import Image
from rich.console import Console
from support.quiet import one_thread_without_gradients  # noqa: F401
from typer.testing import CliRunner

from zipvl_compile.demo.cli import app
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.evaluate import frontier
from zipvl_compile.evaluate.frontier import QUICK_SETUP, Setup, summarised
from zipvl_compile.evaluate.results import ITEMS, LINES, TABLE, newest


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.mark.slow
def test_the_bundled_model_from_the_command_line(tmp_path):
    result = run("--models", "tiny_lvlm", "--variants", "fixed ratio 0.4,picture x 0.63", "--questions", 9,
                 "--output", tmp_path / "made")  # fmt: skip
    assert result.exit_code == 0, result.output
    case = "tiny_lvlm, 9 held-out questions (report)"
    rows = newest(tmp_path / "made")
    assert list(rows) == [(case, "dense"), (case, "fixed ratio 0.4")], "the baseline that is none is left out"
    sparse = rows[case, "fixed ratio 0.4"]
    assert sparse["kept"] == pytest.approx(0.4, abs=0.01) and sparse["kv_bytes_of_dense"] == pytest.approx(
        0.4, abs=0.01
    )
    assert sparse["prefill_flops_of_dense"] < 1 and "accuracy_minus_dense_se" in sparse
    assert {"accuracy_read_all", "accuracy_single_token_minus_dense", "accuracy_multi_token_minus_dense_se"} <= set(
        sparse
    )
    for file in (LINES, ITEMS):
        assert all(json.loads(line) for line in (tmp_path / "made" / file).read_text().splitlines())
    with (tmp_path / "made" / TABLE).open(newline="") as table:
        assert [row["variant"] for row in csv.DictReader(table)] == ["dense", "fixed ratio 0.4"]
    assert Image.open(tmp_path / "made" / "frontier.png").size[0] > 1000
    assert str(tmp_path / "made" / "frontier.csv") in result.output


@pytest.mark.slow
def test_a_model_and_questions_of_ones_own(tmp_path):
    Image.effect_noise((48, 48), 60).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "read all digits :", "answer": "1 2"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    result = run(
        "--model", CHECKPOINT, "--data", tmp_path / "data.jsonl", "--variants", "paper 0.9", "--output", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert [case for case, _ in newest(tmp_path)] == ["checkpoint, 1 questions of data.jsonl"] * 2


def test_a_model_that_is_missing_is_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    console = Console(file=io.StringIO(), width=200)
    assert frontier.evaluate(console, Setup(models=("smollm2", "gemma3"), output=tmp_path)) == 1
    said = console.file.getvalue()
    assert "smollm2 is left out" in said and "gemma3 is left out" in said and "zipvl-compile[eval]" in said
    measured = []
    make = frontier.make_task

    def make_all_but(name, setup):
        return name if name == "tiny_lvlm" else make(name, setup)

    monkeypatch.setattr(frontier, "make_task", make_all_but)
    monkeypatch.setattr(frontier, "run", lambda console, task, variants, output: measured.append(task))
    monkeypatch.setattr(frontier.results, "newest", lambda folder: {})
    monkeypatch.setattr(frontier, "draw", lambda path, rows: None)
    assert frontier.evaluate(console, Setup(models=("smollm2", "tiny_lvlm"), output=tmp_path)) == 0
    assert measured == ["tiny_lvlm"], "the other models are measured all the same"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "gpt"), ("--models", "tiny_lvlm, smollm2, gemma3", "'gpt'")),
        (("--variants", "tau 2"), ("--variants", "'tau 2'")),
        (("--split", "test"), ("--split", "report or choose")),
        (("--data", "x.jsonl"), ("--data", "--model")),
        (("--model", "x", "--data", "x.jsonl"), ("--data", "x.jsonl", "Check the path")),
    ],
    ids=["models", "variants", "split", "data-alone", "data"],
)
def test_errors_are_one_line(arguments, words):
    result = run(*arguments)
    lines = result.output.splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), result.output


def test_quick_and_usual_settings_reach_the_evaluation(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(frontier, "evaluate", lambda console, setup: seen.append(setup) or 0)
    assert run().exit_code == run("--quick", "--documents", 5).exit_code == run("--model", "x").exit_code == 0
    assert seen[0] == Setup()
    assert seen[1] == Setup(**{**QUICK_SETUP, "documents": 5})
    assert seen[2] == Setup(models=(), model="x"), "a model of one's own is measured alone"


def test_accuracy_is_also_that_of_every_group():
    def items(*right):
        return [{"accuracy": float(x), "groups": (kind,)} for x, kind in zip(right, "aab", strict=True)]

    found = summarised(items(1, 0, 0), items(1, 1, 0))
    assert found["accuracy"][0] == pytest.approx(1 / 3) and found["accuracy_a"][0] == 0.5
    assert found["accuracy_a_minus_dense"] == (-0.5, "fraction") and found["accuracy_a_minus_dense_se"][0] == 0.5
    assert found["accuracy_b_minus_dense"] == (0.0, "fraction") and "accuracy_b_se" not in found
