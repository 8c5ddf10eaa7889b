"""The pictures: digits of two splits, drawn on a grid."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

import zipvl_compile.demo.tiny_lvlm.scenes as scenes_module
from zipvl_compile.demo.tiny_lvlm.scenes import (
    CELL,
    COLOUR_NAMES,
    COLOURS,
    GRID,
    IMAGE_SIZE,
    MAX_DIGITS,
    MIN_DIGITS,
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


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scene_shows_what_it_lists(split, monkeypatch):
    monkeypatch.setattr(scenes_module, "NOISE", 0.0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = draw_scene(rng, split)
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and scene.image.dtype == np.uint8
        assert MIN_DIGITS <= len(scene.digits) <= MAX_DIGITS
        assert list(scene.digits) == sorted(scene.digits)
        places = {(one.row, one.column) for one in scene.digits}
        assert len({one.colour for one in scene.digits}) == len(places) == len(scene.digits)

        cells = scene.image.reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2) / 255
        background = cells[next(place for place in np.ndindex(GRID, GRID) if place not in places)][0, 0]
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
