"""Tiles: every token's cell of a picture is the part of the pixels that the model makes it of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")

from families.llava_like import FAMILIES
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from zipvl_compile.demo.tiles import anyres_panels, padded_panels, tile_grid, tile_panels

#: Pixels are colours.
COLOURS = SimpleNamespace(image_mean=[0, 0, 0], image_std=[1, 1, 1])
SQUARE = SimpleNamespace(vision_config=SimpleNamespace(patch_size=8))


def photo(width, height):
    """A picture in which no part looks like another."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def numbered(tiles, side, patch):
    """Tiles `[tiles, 3, side, side]` whose patches have the colours 1, 2, 3, ... of 255, and 8-bit red and green."""
    grid = side // patch
    number = 1 + torch.arange(tiles * grid * grid).view(tiles, 1, grid, grid)
    cells = torch.cat([number % 256, number // 256, torch.zeros_like(number)], 1) / 255
    return cells.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def numbers_of(panel, patch):
    """The number of the patch that is seen behind every token of a panel."""
    colours = np.asarray(panel.picture).astype(int)[patch // 2 :: patch, patch // 2 :: patch]
    return torch.from_numpy(colours[..., 0] + 256 * colours[..., 1])


@pytest.mark.parametrize("size", [(40, 60), (64, 24), (20, 64), (64, 64)], ids=str)
def test_anyres_tokens_lie_where_the_model_takes_them_from(size):
    model = FAMILIES["llava_next"].build().model
    side, patch, grid = 32, 8, 4
    pixels = numbered(5, side, patch)
    sizes = torch.tensor([size])
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    count = image_size_to_num_patches(size, model.config.image_grid_pinpoints, side)
    features = (1 + torch.arange(count * grid * grid)).view(count, grid * grid, 1).float()
    packed = model.pack_image_features([features], sizes, "default", image_newline=torch.tensor([-1.0]))[0][0].flatten()
    inputs = {"pixel_values": pixels[None, :count], "image_sizes": sizes}
    panels = anyres_panels(model.config, COLOURS, inputs, 10 + torch.arange(len(packed)), ["image"])
    assert [panel.name.split()[-1] for panel in panels] == ["tiles", "whole"]
    for panel in panels:
        assert torch.equal(packed[panel.positions - 10].long(), numbers_of(panel, patch))
    drawn = torch.cat([panel.positions.flatten() for panel in panels]).sort().values
    assert torch.equal(drawn, 10 + (packed > 0).nonzero().flatten()), "all but the ends of rows, once"


def test_anyres_counts_what_its_processor_gives():
    pinpoints = [[64, 64], [32, 64], [64, 32], [32, 96]]
    cut = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    config = SimpleNamespace(image_grid_pinpoints=pinpoints, **vars(SQUARE))
    shot = photo(90, 30)
    inputs = cut(images=[shot], return_tensors="pt")
    panels = anyres_panels(config, cut, inputs, torch.arange(16 + 4 * 13), ["image"])
    assert panels[0].name == "image in 1 x 3 tiles" and panels[0].positions.shape == (4, 12)
    expected = np.asarray(shot.resize(panels[0].picture.size), dtype=float)
    assert np.abs(expected - np.asarray(panels[0].picture)).mean() < 6, "the picture is put together rightly"
    assert anyres_panels(config, cut, inputs, torch.arange(16 + 4 * 13 + 1), ["image"]) is None, "another number"


def test_several_images_of_onevision_are_not_cut():
    config = FAMILIES["llava_onevision"].build().config
    inputs = {"pixel_values": numbered(2, 32, 8)[:, None], "image_sizes": torch.tensor([[40, 60], [64, 64]])}
    panels = anyres_panels(config, COLOURS, inputs, torch.arange(2 * 17), ["image 1", "image 2"])
    assert [panel.name for panel in panels] == ["image 1", "image 2"]
    assert torch.equal(numbers_of(panels[1], 8), 17 + torch.arange(16).view(4, 4))
    assert panels[1].positions[0, 0] == 17, "behind the first image and its end"


@pytest.mark.parametrize(("width", "height", "grid"), [(96, 32, (1, 3)), (32, 64, (2, 1)), (96, 64, (2, 3))])
def test_tiles_of_internvl_are_put_in_their_places(width, height, grid):
    cut = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6)
    inputs = cut(images=[photo(width, height)], return_tensors="pt")
    tiles = grid[0] * grid[1] + 1
    inside, whole = tile_panels(SQUARE, cut, inputs, 3 + torch.arange(tiles * 16), ["image"])
    assert inside.name == f"image in {grid[0]} x {grid[1]} tiles" and whole.name == "image, whole"
    assert inside.positions.shape == (4 * grid[0], 4 * grid[1])
    expected = np.asarray(photo(width, height).resize(inside.picture.size), dtype=float)
    assert np.abs(expected - np.asarray(inside.picture)).mean() < 6
    # Tile by tile in reading order, and row by row within one.
    for row, column in ((0, 0), (1, 2), (3, 3), (4 * grid[0] - 1, 4 * grid[1] - 1)):
        tile = row // 4 * grid[1] + column // 4
        assert inside.positions[row, column] == 3 + 16 * tile + 4 * (row % 4) + column % 4
    assert whole.positions[0, 0] == 3 + 16 * (tiles - 1)


def test_tiles_without_a_clear_order_stay_apart():
    """Of an image of one colour, or without a thumbnail, nothing says how it was cut."""
    grey = torch.full((5, 3, 32, 32), 0.5)
    assert tile_grid(grey) is None
    assert tile_grid(torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))) is None
    panels = tile_panels(SQUARE, COLOURS, {"pixel_values": grey}, torch.arange(80), ["image 1"])
    assert [panel.name for panel in panels] == [f"image 1, tile {i} of 5" for i in range(1, 6)]


def test_tiles_of_several_images():
    pixels = {"pixel_values": numbered(4, 32, 8)}
    apart = torch.cat([torch.arange(2, 18), torch.arange(20, 68)])  # one tile, then three
    names = [panel.name for panel in tile_panels(SQUARE, COLOURS, pixels, apart, ["image 1", "image 2"])]
    assert names == ["image 1", *(f"image 2, tile {i} of 3" for i in (1, 2, 3))]
    names = [panel.name for panel in tile_panels(SQUARE, COLOURS, pixels, torch.arange(64), ["image 1", "image 2"])]
    assert names == [f"tile {i} of 4" for i in (1, 2, 3, 4)], "where one image ends is not known"


def test_what_only_fills_up_is_no_tile():
    pixels = numbered(3, 32, 8)[None].clone()
    pixels[0, 2] = 0
    panels = tile_panels(SQUARE, COLOURS, {"pixel_values": pixels}, torch.arange(32), ["image 1", "image 2"])
    assert [panel.name for panel in panels] == ["image 1", "image 2"]
    mask = torch.ones(1, 3, 32, 32)
    mask[0, 1:] = 0
    masked = {"pixel_values": pixels, "pixel_attention_mask": mask}
    assert len(tile_panels(SQUARE, COLOURS, masked, torch.arange(16), ["image"])) == 1


@pytest.mark.parametrize("positions", [torch.arange(31), torch.cat([torch.arange(15), torch.arange(16, 33)])])
def test_tokens_that_are_no_patches_have_no_place(positions):
    assert tile_panels(SQUARE, COLOURS, {"pixel_values": numbered(2, 32, 8)}, positions, ["image 1", "image 2"]) is None


def test_padded_images_of_pixtral():
    config = SimpleNamespace(spatial_merge_size=2, vision_config=SimpleNamespace(patch_size=4))
    pixels = numbered(2, 32, 8)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 32], [32, 24]])}
    panels = padded_panels(config, COLOURS, inputs, torch.arange(8 + 12), ["image 1", "image 2"])
    assert [tuple(panel.positions.shape) for panel in panels] == [(2, 4), (4, 3)]
    assert torch.equal(numbers_of(panels[1], 8), 17 + torch.arange(16).view(4, 4)[:, :3])
    assert panels[1].positions[1].tolist() == [11, 12, 13]
    assert padded_panels(config, COLOURS, inputs, torch.arange(19), []) is None
