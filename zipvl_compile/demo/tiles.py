"""Where image tokens lie in images that the processor gives as pixels: whole, padded, or cut into tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers.image_processing_utils import select_best_resolution

from zipvl_compile.demo.panel import Panel, picture_of, pooled_grid, run_lengths, vision_setting

Inputs = Mapping[str, torch.Tensor]
#: Most that a thumbnail differs from its image put together of tiles: mean over all colours in [0, 1].
SAME_PICTURE = 0.06
#: As many times closer must the right order of tiles be than any other.
CLEARLY = 2.0


def tile_panels(
    config: Any, settings: Any, inputs: Inputs, positions: torch.Tensor, names: Sequence[str]
) -> list[Panel] | None:
    """Return the panels of pixels `[..., 3, H, W]`, tiles of one image in their places where these can be told.

    Args:
        config: of the model.
        settings: the image processor.
        inputs: of one prompt.
        positions: of the image tokens, int64 `[n]`.
        names: of the images, in order; empty where they are not known.

    Returns:
        None where tokens are no patches of tiles.
    """
    tiles = _tiles(inputs)
    if tiles is None or not len(tiles) or positions.numel() % len(tiles):
        return None
    each = positions.numel() // len(tiles)
    grid = pooled_grid(config, tiles.shape[-2], tiles.shape[-1], each)
    runs = run_lengths(positions)
    if grid is None or any(run % each for run in runs):
        return None
    places = positions.view(-1, *grid)
    groups: list[tuple[str, int]]
    if len(tiles) == len(names):
        groups = [(name, 1) for name in names]
    elif len(names) == 1:
        groups = [(names[0], len(tiles))]
    elif len(names) == len(runs):
        groups = [(name, run // each) for name, run in zip(names, runs, strict=True)]
    else:  # which tile belongs to which image is not known
        groups = [(f"tile {i + 1} of {len(tiles)}", 1) for i in range(len(tiles))]
    panels: list[Panel] = []
    start = 0
    for name, count in groups:
        own = slice(start, start + count)
        panels += _of_one_image(name, tiles[own], places[own], settings)
        start += count
    return panels


def _tiles(inputs: Inputs) -> torch.Tensor | None:
    """Return the tiles `[n, 3, H, W]` of a prompt, without those that only fill up."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() < 4 or pixels.shape[-3] != 3:
        return None
    tiles = pixels.flatten(0, -4).float().cpu()
    filled = tiles.flatten(1).any(1)
    mask = inputs.get("pixel_attention_mask")
    if mask is not None and mask.numel() % len(tiles) == 0:
        filled &= mask.reshape(len(tiles), -1).any(1).cpu()
    return tiles[filled]


def _of_one_image(name: str, tiles: torch.Tensor, places: torch.Tensor, settings: Any) -> list[Panel]:
    if len(tiles) == 1:
        return [Panel(name, picture_of(tiles[0], settings), places[0])]
    grid = tile_grid(torch.stack([_colours(tile, settings) for tile in tiles]))
    if grid is None:
        count = len(tiles)
        return [
            Panel(f"{name}, tile {i + 1} of {count}", picture_of(tile, settings), place)
            for i, (tile, place) in enumerate(zip(tiles, places, strict=True))
        ]
    together = picture_of(_mosaic(tiles[:-1], grid), settings)
    inner = _mosaic(places[:-1, None], grid)[0]
    return [
        Panel(f"{name} in {grid[0]} x {grid[1]} tiles", together, inner),
        Panel(f"{name}, whole", picture_of(tiles[-1], settings), places[-1]),
    ]


def _colours(pixels: torch.Tensor, settings: Any) -> torch.Tensor:
    """Return pixels `[3, H, W]` as colours in [0, 1]."""
    return torch.from_numpy(np.array(picture_of(pixels, settings))).permute(2, 0, 1).float() / 255


def tile_grid(tiles: torch.Tensor) -> tuple[int, int] | None:
    """Return rows and columns of the tiles of an image, by its thumbnail, or None where none is clearly right.

    Processors do not say how they cut an image. Put together rightly, and made small, the tiles are the thumbnail.

    Args:
        tiles: colours in [0, 1], `[n + 1, 3, H, W]`, in reading order, the thumbnail behind them.
    """
    count, small = len(tiles) - 1, (32, 32)
    whole = interpolate(tiles[-1:], small, mode="area")
    found = []
    for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
        together = interpolate(_mosaic(tiles[:-1], (rows, count // rows))[None], small, mode="area")
        found.append(((together - whole).abs().mean().item(), rows))
    (best, rows), *others = sorted(found)
    if best > SAME_PICTURE or any(other < CLEARLY * best + 1e-3 for other, _ in others):
        return None
    return rows, count // rows


def _mosaic(tiles: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return `[C, rows * H, columns * W]` of tiles `[rows * columns, C, H, W]` in reading order."""
    return torch.cat([torch.cat(tuple(row), -1) for row in tiles.unflatten(0, grid)], -2)


def anyres_panels(
    config: Any, settings: Any, inputs: Inputs, positions: torch.Tensor, names: Sequence[str]
) -> list[Panel] | None:
    """Return the panels of LLaVA-Next and LLaVA-OneVision: of every image a small whole one, and its tiles together.

    Behind the whole image come the rows of the tiles, less the padding around the image, each with a token for its end.
    Arguments as for `tile_panels`; None where this is not how the tokens lie.
    """
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    patch, pinpoints = vision_setting(config, "patch_size"), getattr(config, "image_grid_pinpoints", None)
    if pixels is None or pixels.dim() != 5 or sizes is None or patch is None or pinpoints is None:
        return None
    if any(hasattr(config, name) for name in ("qformer_config", "downsample_rate")):
        return None
    side = pixels.shape[-1]
    base = side // patch
    inner = [_inner_grid(config, size, pinpoints, side, base) for size in sizes.tolist()]
    lengths = [base * base + rows * (columns + 1) for _, (rows, columns), _ in inner]
    tiled = sum(lengths) == positions.numel()
    if not tiled:  # several images in one prompt of LLaVA-OneVision are not cut, and have one token for the end
        lengths = [base * base + 1] * len(sizes)
        if sum(lengths) != positions.numel():
            return None
    panels = []
    for i, (start, (grid, (rows, columns), cut)) in enumerate(
        zip(itertools.accumulate([0, *lengths[:-1]]), inner, strict=True)
    ):
        name = names[i] if len(names) == len(sizes) else f"image {i + 1}"
        own = positions[start : start + lengths[i]]
        whole = own[: base * base].view(base, base)
        if not tiled:
            panels.append(Panel(name, picture_of(pixels[i, 0], settings), whole))
            continue
        together = _mosaic(pixels[i, 1 : 1 + grid[0] * grid[1]].cpu(), grid)
        bottom, right = (most - edge * patch for most, edge in zip(together.shape[1:], cut, strict=True))
        together = together[:, cut[0] * patch : bottom, cut[1] * patch : right]
        lines = own[base * base :].view(rows, columns + 1)[:, :-1]
        panels += [
            Panel(f"{name} in {grid[0]} x {grid[1]} tiles", picture_of(together, settings), lines),
            Panel(f"{name}, whole", picture_of(pixels[i, 0], settings), whole),
        ]
    return panels


def _inner_grid(
    config: Any, size: Sequence[int], pinpoints: Any, side: int, base: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return rows and columns of tiles, of tokens in them, and how many patches of padding each edge loses."""
    high, wide = select_best_resolution(tuple(size), pinpoints)
    grid = (high // side, wide // side)
    rows, columns = grid[0] * base, grid[1] * base
    cut = (0, 0)
    if size[1] / size[0] > columns / rows:
        cut = ((rows - int(round(size[0] * (columns / size[1]), 7))) // 2, 0)
    else:
        cut = (0, (columns - int(round(size[1] * (rows / size[0]), 7))) // 2)
    rows, columns = rows - 2 * cut[0], columns - 2 * cut[1]
    most = str(getattr(config, "vision_aspect_ratio", ""))
    if most.startswith("anyres_max_"):
        ratio = math.sqrt(rows * columns / (int(most.removeprefix("anyres_max_")) * base**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return grid, (rows, columns), cut


def padded_panels(
    config: Any, settings: Any, inputs: Inputs, positions: torch.Tensor, names: Sequence[str]
) -> list[Panel] | None:
    """Return the panels of Pixtral and what takes its images: padded to one size `[N, 3, H, W]`, with `image_sizes`.

    Arguments as for `tile_panels`; None where this is not how the tokens lie.
    """
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    patch, merge = vision_setting(config, "patch_size"), getattr(config, "spatial_merge_size", 1)
    if pixels is None or pixels.dim() != 4 or sizes is None or patch is None or not isinstance(merge, int):
        return None
    grids = [(height // (patch * merge), width // (patch * merge)) for height, width in sizes.tolist()]
    counts = [rows * columns for rows, columns in grids]
    if sum(counts) != positions.numel() or len(pixels) != len(counts):
        return None
    panels = []
    for i, (own, grid) in enumerate(zip(positions.split(counts), grids, strict=True)):
        height, width = sizes[i].tolist()
        name = names[i] if len(names) == len(counts) else f"image {i + 1}"
        panels.append(Panel(name, picture_of(pixels[i, :, :height, :width], settings), own.view(grid)))
    return panels
