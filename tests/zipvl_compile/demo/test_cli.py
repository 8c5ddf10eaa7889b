"""The command line on a tiny untrained LLaVA: what it prints, what it draws, and how it fails."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from PIL import Image
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from zipvl_compile import __version__
from zipvl_compile.demo import plots
from zipvl_compile.demo import side_by_side as demo
from zipvl_compile.demo.cli import app
from zipvl_compile.demo.tiny_lvlm.build import build_config, build_model, build_processor

LAYERS = 2
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA as the bundled one, with fewer layers and random weights, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    config = build_config()
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = LAYERS, 1
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = build_model(0).generation_config
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fewer_graphs(monkeypatch):
    # The input checks of transformers break the graph; the time that takes is better spent elsewhere.
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    Image.effect_noise((48, 48), 60).save(path)
    return path


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def fails_in_one_line(result, *words):
    lines = result.output.splitlines()
    assert result.exit_code == 2 and len(lines) == 1, result.output
    assert all(word in lines[0] for word in words), lines[0]


def test_version():
    assert run("--version").output.strip() == f"zipvl-compile {__version__}"


def test_explain_lists_every_layer(folder, picture):
    words = ("--image", picture, "--prompt", "read all digits :", "--option", "min_tokens=0", "--cost")
    result = run("explain", folder, *words)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())  # the terminal wraps lines
    assert flat.count("this prompt: dense") == LAYERS and "tokens at" in flat, "what --cost adds"
    assert f"{2 * LAYERS} attention sites rewritten, 1 dense; prompt of 261 tokens" in result.output
    assert result.output.count("rewritten") == 1 + 2 * LAYERS


def test_demo_compares_and_draws(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CHECKPOINT", folder)
    output = tmp_path / "made" / "demo.png"
    # tau = 1 keeps every token, so even random weights must give the same answers.
    result = run("demo", "--questions", 4, "--tau", 1.0, "--inner", "eager", "--output", output)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    for text in (
        "min_tokens",
        "Right answers",
        "Kept prompt tokens",
        "100.0%",
        "KV cache",
        "prefill",
        "decode",
        "make bench",
    ):
        assert text in result.output
    width, height = Image.open(output).size
    assert width > 2 * height > 0  # the image and one panel per layer, side by side


def test_demo_fails_when_answers_differ(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CHECKPOINT", folder)
    monkeypatch.setattr(demo, "LEAST_AGREEMENT", 1.01)
    result = run("demo", "--questions", 1, "--inner", "eager", "--output", tmp_path / "demo.png")
    assert result.exit_code == 1 and "FAILED: 0 of 1 answers differ" in result.output


def test_demo_of_another_model(folder, picture, tmp_path):
    output = tmp_path / "demo.png"
    arguments = ("--image", picture, "--prompt", "read all digits :", "--max-new-tokens", 3, "--output", output)
    result = run("demo", "--model", folder, *arguments, "--inner", "eager")
    assert result.exit_code == 0, result.output
    assert "a prompt of 261 tokens" in " ".join(result.output.split()) and output.exists()


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
        (("demo", "--output", "x.txt"), (".png", "x.txt")),
    ],
    ids=["path", "option-form", "option-value", "image", "device", "tau", "no-image", "no-model", "output"],
)
def test_errors_are_one_line(arguments, words):
    fails_in_one_line(run(*arguments), *words)


def test_missing_checkpoint_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CHECKPOINT", tmp_path)
    fails_in_one_line(run("demo"), "make train")


def test_missing_extra_names_the_install_command():
    script = "import sys; sys.modules['typer'] = None; import zipvl_compile.demo.cli"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "typer" in result.stderr and "pip install 'zipvl-compile[demo]'" in result.stderr


def test_kept_patches_keep_their_colour_and_dropped_ones_fade(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.extend(figure.axes))
    red = Image.new("RGB", (8, 8), "red")
    # Image tokens 1 to 4 are a 2 x 2 grid; token 0 and tokens 5, 6 are text.
    plots.draw_kept_patches(tmp_path / "x.png", red, {0: torch.tensor([0, 2, 6])}, torch.arange(1, 5), (2, 2), 7)
    panel = drawn[1].images[0].get_array()
    height, width = panel.shape[0] // 2, panel.shape[1] // 2
    corners = {(row, column): panel[row * height, column * width] for row in (0, 1) for column in (0, 1)}
    assert [place for place, colour in corners.items() if tuple(colour) == (1, 0, 0)] == [(0, 1)]
    assert "kept 1 of 4 patches" in drawn[1].get_title() and "3 of 7 tokens (43%)" in drawn[1].get_title()


def test_strips_where_the_grid_is_not_known(tmp_path):
    path = tmp_path / "strips.png"
    kept = {layer: torch.arange(0, 50, layer + 1) for layer in (0, 2)}
    plots.draw_kept_strips(path, Image.new("RGB", (20, 10)), kept, 50, "title")
    assert Image.open(path).size[0] > 400
