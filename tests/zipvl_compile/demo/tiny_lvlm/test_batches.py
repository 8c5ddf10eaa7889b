"""Training batches: labels of patches, questions packed behind an image."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.batches import kept_patches, log_weights, packed_mask, patch_labels
from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES, SMALL
from zipvl_compile.demo.tiny_lvlm.scenes import COLOUR_NAMES, MAX_DIGITS, draw_scene


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


def test_background_weighs_as_much_as_all_of_it_and_digits_as_themselves():
    rng = np.random.default_rng(1)
    scenes = [draw_scene(rng, "train", count, count) for count in (2, MAX_DIGITS)]
    kept = kept_patches(rng, scenes, 30)
    digits, _ = patch_labels(scenes)
    for scene, row, labels in zip(scenes, log_weights(scenes, kept), digits.gather(1, kept), strict=True):
        count = len(scene.digits)
        many = math.log((SMALL.tokens - count) / (30 - count))
        torch.testing.assert_close(row, torch.where(labels < 10, 0.0, many))
    everything = torch.arange(SMALL.tokens).expand(2, -1)
    assert (log_weights(scenes, everything) == 0).all()


def test_a_patch_of_a_weight_is_attended_to_as_so_many_of_it():
    """Patch 2 of 3 weighs 4: as three more of the same at its place."""
    group = torch.tensor([[0, 0, 1]])
    weights = torch.tensor([[0.0, math.log(4), 0.0]])
    mask = packed_mask(group, 4, weights)[0, 0]
    assert torch.equal(mask > float("-inf"), packed_mask(group, 4)[0, 0])
    q, k, v = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    many = torch.tensor([0, 1, 2, 2, 2, 2, 3, 4, 5, 6])
    expected = F.scaled_dot_product_attention(q, k[many], v[many], packed_mask(group, 4)[0, 0][:, many])
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), expected)
