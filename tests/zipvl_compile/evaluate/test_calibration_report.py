"""`zipvl calibrate` from the command line, on the bundled model."""

import json

import pytest
from typer.testing import CliRunner

from zipvl_compile.demo.cli import app
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.evaluate import questions_for_demo
from zipvl_compile.evaluate.calibration_report import asked
from zipvl_compile.options import ZipVLOptions


def test_pictures_of_a_folder_and_lines_of_a_file(tmp_path):
    for name in ("b.png", "a.jpg", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert asked(tmp_path, "what?", 9) == [(tmp_path / "a.jpg", "what?"), (tmp_path / "b.png", "what?")]
    assert asked(tmp_path, "what?", 1) == [(tmp_path / "a.jpg", "what?")]
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"image": "x/b.png", "question": "who?"}\n\n{"image": "a.jpg", "question": 7}\n')
    assert asked(lines, "what?", 9) == [(tmp_path / "x/b.png", "who?"), (tmp_path / "a.jpg", "7")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none", None, "expected a folder of pictures"),
        ("e.jsonl", "", "at least one line"),
        ("f.jsonl", "{}", "line 1"),
    ],
)
def test_what_is_wrong_with_the_data(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        asked(tmp_path / name, "what?", 9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected pictures in a folder, got none"):
        asked(tmp_path / "empty", "what?", 9)


def test_the_bundled_model(tmp_path):
    lines = []
    for i, question in enumerate(questions_for_demo(2, seed=5)):
        question.image.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": question.prompt}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    output = tmp_path / "c.json"
    done = CliRunner().invoke(app, [
        "calibrate", str(CHECKPOINT), "--data", str(tmp_path / "data.jsonl"), "--option", "tau=0.7",
        "--target-kl", "0.01", "--output", str(output),
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "selects costs and saves, 2 prompts" in done.output and "target 0.01" in done.output
    found = json.loads(output.read_text())
    assert sorted({one["layer"] for one in found["choices"]}) == [0, 1, 2, 3] and found["cost"] <= 0.01
    assert {one["skip"] for one in found["choices"]} == {"attention", "layer"}
    assert ZipVLOptions.parse({"calibration": str(output)}).dense_layers == tuple(found["options"]["dense_layers"])
