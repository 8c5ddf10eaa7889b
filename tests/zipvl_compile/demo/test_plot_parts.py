"""The panels of the picture: what their artists show."""

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")

from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from PIL import Image

from zipvl_compile.demo.panel import Panel
from zipvl_compile.demo.plot_parts import WIDTH, Enlarged, Header, Views, as_array, shares, show_kept, wrapped

RED = Image.new("RGB", (6, 4), "red")


def drawn(part):
    figure = Figure(figsize=(WIDTH, part.height))
    part.draw(figure, 0.0)
    return figure


def hatched(axes):
    """Row and column of every hatched token."""
    (patch,) = [one for one in axes.patches if isinstance(one, PathPatch)]
    assert patch.get_hatch()
    return {(int(polygon[:, 1].min()), int(polygon[:, 0].min())) for polygon in patch.get_path().to_polygons()}


def test_shares_of_groups_of_heads():
    assert shares(torch.tensor([1, 4]), torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 0], [0, 1]]
    assert shares(torch.tensor([[1, 4], [1, 2]]), torch.arange(5)).tolist() == [0, 1, 0.5, 0, 0.5]


def test_what_is_kept_stays_and_what_is_dropped_is_pale_and_hatched():
    axes = Figure().add_subplot()
    kept = np.array([[1, 0, 1], [0.5, 0, 0]])
    show_kept(axes, as_array(Panel("x", RED, torch.zeros(2, 3)), 30), kept)
    picture = axes.images[0].get_array()
    middles = picture[5::10, 5::10]
    assert middles.shape == (2, 3, 3) and middles[0, 0].tolist() == [1, 0, 0] == middles[0, 2].tolist()
    assert middles[0, 1].min() > 0.8 and 0.3 < middles[1, 0][1] < 0.5, "half of the heads: half as pale"
    assert hatched(axes) == {(0, 1), (1, 1), (1, 2)}
    assert axes.images[0].get_extent() == [0, 3, 2, 0], "tokens are the units, the first row on top"


def test_every_layer_has_a_view_of_every_panel():
    panels = [
        Panel("image 1", RED, torch.arange(1, 7).view(2, 3)),
        Panel("image 2", RED, torch.arange(7, 15).view(4, 2)),
    ]
    figure = drawn(Views(panels, {0: torch.tensor([0, 2, 9]), 3: torch.tensor([14, 15])}, 16, [(1, 2)]))
    assert [text.get_text() for text in figure.texts] == [
        "what the model sees", "layer 0: 19% of prompt kept", "layer 3: 12% of prompt kept",
    ]  # fmt: skip
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "image 1\n2 x 3 tokens", "image 2\n4 x 2 tokens",
        "image 1\n1 of 6 kept (17%)", "image 2\n1 of 8 kept (12%)",
        "image 1\n0 of 6 kept (0%)", "image 2\n1 of 8 kept (12%)",
    ]  # fmt: skip
    everything = [{(r, c) for r in range(2) for c in range(3)}, {(r, c) for r in range(4) for c in range(2)}]
    assert hatched(figure.axes[2]) == everything[0] - {(0, 1)} and hatched(figure.axes[3]) == everything[1] - {(1, 0)}
    assert hatched(figure.axes[4]) == everything[0] and hatched(figure.axes[5]) == everything[1] - {(3, 1)}
    (circle,) = figure.axes[0].patches
    assert circle.center == (2.5, 1.5), "column, row of the cell"
    assert len({round(axes.get_position().y1, 3) for axes in figure.axes}) == 1, "side by side"


def test_views_never_overlap_and_stay_on_the_page():
    for count, layers in ((1, 8), (2, 3), (3, 2), (8, 4)):
        panels = [Panel(str(i), None, torch.zeros(3 + i, 5)) for i in range(count)]
        figure = drawn(Views(panels, {n: torch.tensor([0]) for n in range(layers)}, 9, []))
        boxes = [axes.get_position() for axes in figure.axes]
        assert len(boxes) == count * (layers + 1)
        assert all(box.x0 > 0 and box.x1 < 1 and box.y0 >= 0 and box.y1 < 1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_panel_without_a_picture_is_grey():
    array = as_array(Panel("x", None, torch.zeros(2, 3)))
    assert array.shape == (512, 768, 3) and (array == array[0, 0]).all()


def test_cells_are_enlarged_as_they_are_and_as_the_layers_kept_them():
    panel = Panel("image", Image.new("RGB", (9, 7), "red"), torch.arange(1, 64).view(7, 9))
    # Row 6, column 0 is token 55, kept by one of two layers; its surroundings end where the image does.
    figure = drawn(Enlarged(panel, {0: torch.tensor([55]), 2: torch.tensor([3])}, [(6, 0), (0, 2)]))
    shown, faded, _, above = figure.axes
    assert shown.get_title(loc="left") == "row 7\ncolumn 1"
    assert faded.get_title(loc="left") == above.get_title(loc="left") == "kept by\n1 of 2 layers"
    assert (shown.images[0].get_array() == [1, 0, 0]).all()
    corner = faded.images[0].get_array()[-1, 0]
    assert corner[0] > corner[1] > 0, "half as pale as what no layer kept"
    around = {(row, column) for row in range(5) for column in range(5)}
    assert hatched(faded) == around - {(4, 0)} and hatched(above) == around - {(0, 2)}


def test_the_header_says_what_the_panels_mean():
    figure = drawn(Header("title", ["question: $5 or $6?", ""], True))
    assert [text.get_text() for text in figure.texts] == ["title", "question: $5 or $6?"]
    assert not figure.texts[1].get_parse_math(), "an answer is no formula"
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "kept in the KV cache" in said[0] and "hatched" in said[1]
    assert not drawn(Header("title", [], False)).legends


def test_long_lines_are_wrapped_and_cut():
    assert wrapped("a " * 100, 20).count("\n") == 2 and wrapped("a " * 100, 20).endswith("...")
