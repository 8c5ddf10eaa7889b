"""The command line on a tiny untrained LLaVA: what it prints, what it draws, and how it fails."""

import dataclasses
import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from PIL import Image
from typer.testing import CliRunner

from zipvl_compile import __version__
from zipvl_compile.demo import bundled as demo
from zipvl_compile.demo.cli import app
from zipvl_compile.report import machine
from zipvl_compile.report.known_machines import CPU

LAYERS = 2
runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def fails_in_one_line(result, *words):
    lines = result.output.splitlines()
    assert result.exit_code == 2 and len(lines) == 1, result.output
    assert all(word in lines[0] for word in words), lines[0]


def test_version():
    assert run("--version").output.strip() == f"zipvl-compile {__version__}"


def test_explain_lists_every_layer_and_draws(folder, picture, tmp_path):
    words = ("--image", picture, "--prompt", "read all digits :", "--option", "min_tokens=0", "--cost")
    words += ("--output", tmp_path / "explained.png")
    result = run("explain", folder, *words)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())  # the terminal wraps lines
    # What --cost adds; whether a layer pays "never" is up to the machine.
    assert flat.count("this prompt: dense") == flat.count(": pays ") == LAYERS
    assert f"{2 * LAYERS} attention sites rewritten, 1 dense; prompt of 261 tokens" in result.output
    assert result.output.count("rewritten") == 1 + 2 * LAYERS
    assert Image.open(tmp_path / "explained.png").size[0] == 1200 and str(tmp_path / "explained.png") in result.output


def test_demo_compares_and_draws(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LARGE_CHECKPOINT", folder)
    output = tmp_path / "made" / "demo.png"
    # tau = 1 keeps every token, so even random weights must give the same answers.
    given = ("--tau", 1.0, "--option", "min_tokens=0", "--option", "queries=all")
    result = run("demo", "--questions", 4, *given, "--inner", "eager", "--output", output)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 or line.endswith(str(output)) for line in result.output.splitlines())
    for text in (
        "min_tokens",
        "By default, this prompt stays dense",
        "Right answers",
        "Kept prompt tokens",
        "100.0%",
        "KV cache",
        "prefill",
        "decode",
        "KV cache 1.1x larger (",
        "4 of 4 answers the same.",
    ):
        assert text in " ".join(result.output.split()), text
    assert Image.open(output).size[0] == 1200


def test_demo_of_another_model(folder, picture, tmp_path):
    output = tmp_path / "demo.png"
    arguments = ("--image", picture, "--image", picture, "--prompt", "read all digits :", "--max-new-tokens", 3)
    arguments += ("--output", output)
    result = run("demo", "--model", folder, *arguments, "--inner", "eager")
    assert result.exit_code == 0, result.output
    assert "a prompt of 517 tokens" in " ".join(result.output.split()) and output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain", "./no_such_model"), ("no_such_model", "Check the path")),
        (("explain", "x", "--option", "tau"), ("--option", "key=value", "'tau'")),
        (("explain", "x", "--option", "tau=2"), ("'tau'", "fraction in (0, 1]", "2")),
        (("explain", "x", "--image", "none.png"), ("none.png", "image file")),
        (("explain", "x", "--device", "abacus"), ("abacus", "device")),
        (("demo", "--tau", "0"), ("'tau'", "fraction in (0, 1]")),
        (("demo", "--model", "x"), ("--image",)),
        (("demo", "--image", "x.png"), ("--model",)),
        (("demo", "--video", "x.mp4"), ("--video", "--model")),
        (("demo", "--model", "x", "--video", "none.mp4"), ("none.mp4", "Check the path")),
        (("explain", "x", "--output", "x.txt"), (".png", "x.txt")),
        (("demo", "--tau", "0.9", "--option", "tau=0.8"), ("'tau' twice",)),
        (("demo", "--option", "taau=0.8"), ("Did you mean 'tau'",)),
        (("demo", "--output", "x.txt"), (".png", "x.txt")),
        (("demo", "--model", "x", "--tau", "0", "--output", "x.txt"), (".png", "x.txt")),
        (("measure", "--dtype", "int8"), ("--dtype", "int8")),
        (("measure", "--device", "abacus"), ("abacus",)),
    ],
    ids=[
        "path",
        "option-form",
        "option-value",
        "image",
        "device",
        "tau",
        "no-image",
        "no-model",
        "video-no-model",
        "no-video",
        "explain-output",
        "twice",
        "option-name",
        "output",
        "output-first",
        "dtype",
        "no-device",
    ],
)
def test_errors_are_one_line(arguments, words):
    fails_in_one_line(run(*arguments), *words)


def test_an_output_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "x.png").mkdir()
    fails_in_one_line(run("demo", "--output", tmp_path / "x.png"), "can be written", "x.png")


def test_measure_shows_and_renews(tmp_path, monkeypatch):
    monkeypatch.setenv("ZIPVL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "_measure", lambda *given: dataclasses.replace(CPU, site=2.0))
    asked = ("measure", "--device", "cpu", "--dtype", "float32")
    assert "Nothing is known of" in run(*asked, "--show").output
    first = run(*asked)
    assert first.exit_code == 0 and "site 2," in first.output and str(tmp_path / "machines.json") in first.output
    monkeypatch.setattr(machine, "_measure", lambda *given: dataclasses.replace(CPU, site=4.0))
    assert run(*asked, "--show").output == first.output
    second = run(*asked).output.splitlines()
    assert second[0] == "was: " + first.output.strip() and "site 4," in second[1] and len(second) == 2


def test_measure_without_a_place_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZIPVL_CACHE_DIR", str(tmp_path / "file"))
    fails_in_one_line(run("measure", "--device", "cpu", "--dtype", "float32"), "cannot be written")


def test_missing_checkpoint_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LARGE_CHECKPOINT", tmp_path)
    fails_in_one_line(run("demo"), "make train")


def test_missing_extra_names_the_install_command():
    script = "import sys; sys.modules['typer'] = None; import zipvl_compile.demo.cli"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    last = result.stderr.splitlines()[-1]  # optional libraries may speak before it
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "typer" in last and "pip install 'zipvl-compile[demo]'" in last
