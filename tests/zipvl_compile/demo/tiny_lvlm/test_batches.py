"""Training batches: labels of patches, questions packed behind an image."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.batches import kept_patches, patch_labels
from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES
from zipvl_compile.demo.tiny_lvlm.scenes import COLOUR_NAMES, draw_scene


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
def test_kept_patches_hold_every_digit(canvas):
    rng, grid = np.random.default_rng(1), canvas.grid
    scenes = [draw_scene(rng, canvas=canvas) for _ in range(4)]
    kept = kept_patches(rng, scenes, 20)
    digits, colours = patch_labels(scenes)
    assert kept.shape == (4, 20) and (kept.diff(dim=1) > 0).all()
    for row, scene in enumerate(scenes):
        shown = [(index // grid, index % grid) for index in kept[row].tolist() if digits[row, index] < 10]
        assert shown == [(one.row, one.column) for one in scene.digits]
        assert [COLOUR_NAMES[index] for index in colours[row][kept[row]].tolist() if index < len(COLOUR_NAMES)] == [
            one.colour for one in scene.digits
        ]
