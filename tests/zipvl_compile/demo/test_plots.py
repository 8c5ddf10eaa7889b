"""Pictures of the kept image patches."""

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from PIL import Image

from zipvl_compile.demo import plots


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


def test_cells_are_enlarged_as_they_are_and_as_the_layers_kept_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.extend(figure.subfigs[1].axes))
    red, everything = Image.new("RGB", (8, 8), "red"), torch.arange(1, 65)
    # Patch (7, 0) is token 57, kept by one of two layers; its surroundings end where the image does.
    kept = {0: torch.tensor([57]), 2: torch.tensor([3])}
    plots.draw_kept_patches(tmp_path / "x.png", red, kept, everything, (8, 8), 70, "", [(7, 0)])
    shown, faded = (axis.images[0].get_array() for axis in drawn)
    side = 2 * plots.AROUND + 1
    scale = shown.shape[0] // side
    assert shown.shape == faded.shape == (side * scale, side * scale, 3)
    assert (shown == [1, 0, 0]).all()
    corner, beside = faded[-1, 0], faded[-1, -1]
    assert corner[0] > corner[1] > 0, "half as pale as what no layer kept"
    assert beside[1] > corner[1]
    assert drawn[1].get_title() == "kept by 1 of 2 layers" and drawn[0].get_title() == "row 8, column 1"


def test_strips_where_the_grid_is_not_known(tmp_path):
    path = tmp_path / "strips.png"
    kept = {layer: torch.arange(0, 50, layer + 1) for layer in (0, 2)}
    plots.draw_kept_strips(path, Image.new("RGB", (20, 10)), kept, 50, "title")
    assert Image.open(path).size[0] > 400


@pytest.mark.parametrize("title", ["costs $5 or $6?", r"a \frac and $x_1^2$", "$$", r"\$"])
def test_answers_are_drawn_literally(tmp_path, title):
    """What a model writes is no formula: matplotlib would read text between dollar signs as one."""
    path, grey = tmp_path / "x.png", Image.new("RGB", (8, 8))
    plots.draw_kept_patches(path, grey, {0: torch.tensor([1])}, torch.arange(1, 5), (2, 2), 7, title)
    plots.draw_kept_strips(path, grey, {0: torch.tensor([1])}, 7, title)
    assert Image.open(path).size[0] > 100
