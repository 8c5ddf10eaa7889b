"""The pictures: digits of two splits, drawn on a grid."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

import zipvl_compile.demo.tiny_lvlm.scenes as scenes_module
from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES, CELL, SMALL
from zipvl_compile.demo.tiny_lvlm.scenes import (
    COLOUR_NAMES,
    COLOURS,
    MAX_DIGITS,
    MIN_DIGITS,
    draw_layout,
    draw_patches,
    draw_scene,
    split_indices,
)


def test_splits_share_no_digit():
    train, held_out = (set(split_indices()[split].tolist()) for split in ("train", "held_out"))
    assert not train & held_out
    assert train | held_out == set(range(1797))
    assert len(held_out) == 359


def test_splits_share_no_picture():
    from sklearn.datasets import load_digits

    images = load_digits().images
    train, held_out = ({images[row].tobytes() for row in split_indices()[split]} for split in ("train", "held_out"))
    assert not train & held_out


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scene_shows_what_it_lists(split, canvas, monkeypatch):
    monkeypatch.setattr(scenes_module, "NOISE", 0.0)
    rng = np.random.default_rng(0)
    grid = canvas.grid
    for _ in range(50 if canvas == SMALL else 3):
        scene = draw_scene(rng, split, canvas=canvas)
        assert scene.image.shape == (canvas.size, canvas.size, 3) and scene.image.dtype == np.uint8
        assert MIN_DIGITS <= len(scene.digits) <= MAX_DIGITS
        assert list(scene.digits) == sorted(scene.digits)
        places = {(one.row, one.column) for one in scene.digits}
        assert len({one.colour for one in scene.digits}) == len(places) == len(scene.digits)

        cells = scene.image.reshape(grid, CELL, grid, CELL, 3).swapaxes(1, 2) / 255
        background = cells[next(place for place in np.ndindex(grid, grid) if place not in places)][0, 0]
        difference = cells - background
        assert set(zip(*np.nonzero(np.abs(difference).max(axis=(2, 3, 4)) > 0.02), strict=True)) == places
        for one in scene.digits:
            ink = difference[one.row, one.column].reshape(-1, 3)
            ink = ink[np.abs(ink).sum(1).argmax()]
            paints = np.array(list(COLOURS.values())) - background
            likeness = paints @ ink / np.linalg.norm(paints, axis=1)
            assert COLOUR_NAMES[likeness.argmax()] == one.colour


def test_same_seed_same_scene():
    first, second = (draw_scene(np.random.default_rng(3), "held_out") for _ in range(2))
    assert first.digits == second.digits and (first.image == second.image).all()


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
def test_patches_alone_are_those_of_the_scene(canvas, monkeypatch):
    monkeypatch.setattr(scenes_module, "NOISE", 0.0)
    scene = draw_scene(np.random.default_rng(5), "held_out", canvas=canvas)
    rng = np.random.default_rng(5)
    layout = draw_layout(rng, "held_out", MIN_DIGITS, MAX_DIGITS, canvas)
    assert layout.digits == scene.digits and layout.canvas == scene.canvas
    patches = np.sort(np.concatenate([layout.cells, [0, 1, canvas.tokens - 1]]))
    grid = canvas.grid
    cells = scene.image.reshape(grid, CELL, grid, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3)
    assert (draw_patches(rng, layout, patches) == cells[patches]).all()
    monkeypatch.setattr(scenes_module, "NOISE", 0.08)
    noise = draw_patches(rng, layout, np.arange(200)) / 255 - draw_patches(rng, layout, np.arange(200)) / 255
    assert 0.1 < noise.std() < 0.125, "twice the variance"
