"""Rectangles of image tokens: their pictures, and when tokens are the patches of an image."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")

from zipvl_compile.demo.panel import modality_positions, picture_of, pooled_grid, run_lengths, vision_setting


def config(**more):
    return SimpleNamespace(vision_config=SimpleNamespace(patch_size=8), image_token_id=5, video_token_id=6, **more)


def test_pixels_become_the_picture_again():
    colours = torch.tensor([255.0, 0.0, 64.0])[:, None, None].expand(3, 4, 6) / 255
    settings = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    mean, std = (torch.tensor(one)[:, None, None] for one in (settings.image_mean, settings.image_std))
    picture = picture_of((colours - mean) / std, settings)
    assert picture.size == (6, 4) and picture.getpixel((5, 3)) == (255, 0, 64)
    spread = picture_of(torch.linspace(-3, 9, 72).view(3, 4, 6), None)
    assert spread.getpixel((0, 0))[0] == 0 and spread.getpixel((5, 3))[2] == 255, "without a mean, black to white"


@pytest.mark.parametrize(
    ("height", "width", "tokens", "grid"),
    [
        (64, 96, 96, (8, 12)),
        (64, 96, 24, (4, 6)),  # two by two
        (64, 64, 17, None),
        (56, 56, 16, (4, 4)),  # 7 / 2, rounded up
    ],
)
def test_the_grid_is_that_of_the_patches_pooled(height, width, tokens, grid):
    assert pooled_grid(config(), height, width, tokens) == grid


def test_queries_are_no_patches():
    assert pooled_grid(config(qformer_config=None), 64, 64, 64) is None
    assert pooled_grid(SimpleNamespace(), 64, 64, 64) is None, "no patch size"


def test_settings_of_the_tower():
    tower = SimpleNamespace(patch_size=[4, 4], odd=[4, 8], text="x")
    settings = SimpleNamespace(vision_config=tower)
    assert [vision_setting(settings, name) for name in ("patch_size", "odd", "text", "none")] == [4, None, None, None]


def test_runs():
    assert run_lengths(torch.tensor([1, 2, 3, 7, 9, 10])) == [3, 1, 2]
    assert run_lengths(torch.empty(0, dtype=torch.int64)) == []


def test_images_and_videos_are_told_apart():
    ids = torch.tensor([[1, 5, 5, 2, 6, 5]])
    assert modality_positions(config(), {"input_ids": ids}, "image").tolist() == [1, 2, 5]
    assert modality_positions(config(), {"input_ids": ids}, "video").tolist() == [4]
    typed = {"input_ids": ids, "mm_token_type_ids": torch.tensor([[0, 1, 1, 0, 2, 2]])}
    assert modality_positions(config(), typed, "video").tolist() == [4, 5], "frames under the token of images"
    assert modality_positions(config(), typed, "image").tolist() == [1, 2]
    assert modality_positions(SimpleNamespace(), {"input_ids": ids}, "image").numel() == 0
