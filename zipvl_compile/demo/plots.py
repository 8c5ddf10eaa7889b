"""Which image patches each decoder layer kept, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Circle
from PIL import Image

PANEL_INCHES = 2.6
MAX_COLUMNS = 6
PICTURE_PIXELS = 768
ZOOM_INCHES = 3.4
AROUND = 2  # patches on each side of an enlarged one
LEGEND = (
    "In colour: patches that a layer keeps in its KV cache, which every later word can look at. "
    "Pale: patches that it dropped; their memory is free."
)
KEPT_COLOUR, DROPPED_COLOUR = (0.10, 0.35, 0.65), (0.92, 0.92, 0.92)


def draw_kept_patches(
    path: Path,
    image: Image.Image,
    kept: Mapping[int, torch.Tensor],
    image_tokens: torch.Tensor,
    grid: tuple[int, int],
    prompt_length: int,
    title: str = "",
    cells: Sequence[tuple[int, int]] = (),
) -> None:
    """Write a picture with one panel per layer, in which the patches that the layer dropped are faded.

    Where cells are given, each has a column below: what is around it, and what the layers kept of that.

    Args:
        path: of the PNG.
        image: as the model sees it.
        kept: positions of the kept prompt tokens, int64 `[P]`, by layer number.
        image_tokens: positions of the image tokens in the prompt, int64 `[rows * columns]`, in reading order.
        grid: rows and columns of patches.
        prompt_length: of the prompt (tokens).
        title: above the panels: the question and the answers.
        cells: row and column of patches to enlarge.
    """
    rows, columns = grid
    scale = max(1, PICTURE_PIXELS // max(grid))
    picture = np.asarray(image.convert("RGB").resize((columns * scale, rows * scale), Image.Resampling.NEAREST)) / 255
    chosen = {
        layer: torch.isin(image_tokens, positions.cpu()).reshape(rows, columns).numpy()
        for layer, positions in kept.items()
    }
    count = 1 + len(kept)
    width = PANEL_INCHES * min(count, MAX_COLUMNS)
    height = (PANEL_INCHES * rows / columns + 0.5) * math.ceil(count / MAX_COLUMNS) + 1.4
    figure = Figure(figsize=(width, height + (ZOOM_INCHES if cells else 0)), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)  # an answer may hold dollar signs
    figure.supxlabel(LEGEND, fontsize=9)
    heights = (height, ZOOM_INCHES) if cells else (height,)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = _panels(parts[0], count)
    axes[0].imshow(picture)
    axes[0].set_title(f"the image: {rows} x {columns} patches", fontsize=9)
    for row, column in cells:
        middle = (column * scale + scale / 2, row * scale + scale / 2)
        axes[0].add_patch(Circle(middle, 2.5 * scale, fill=False, edgecolor="white", linewidth=0.8))
    for (layer, positions), axis in zip(kept.items(), axes[1:], strict=False):
        axis.imshow(_fade(picture, chosen[layer].repeat(scale, 0).repeat(scale, 1)))
        patches = f"{int(chosen[layer].sum())} of {rows * columns} patches"
        axis.set_title(f"layer {layer}: kept {patches}\n{_count(positions, prompt_length)}", fontsize=9)
    if cells:
        _draw_enlarged(parts[1], picture, list(chosen.values()), cells, scale)
    _save(figure, path)


def _draw_enlarged(
    figure: SubFigure, picture: np.ndarray, chosen: list[np.ndarray], cells: Sequence[tuple[int, int]], scale: int
) -> None:
    """Draw what is around each cell, and below it the same with patches paler the fewer of the layers kept them."""
    share = np.mean(chosen, axis=0).repeat(scale, 0).repeat(scale, 1)[..., None]
    faded = share * picture + (1 - share) * _fade(picture, np.zeros(picture.shape[:2], bool))
    axes = figure.subplots(2, len(cells), squeeze=False)
    for (row, column), pair in zip(cells, axes.T, strict=True):
        side, (rows, columns) = 2 * AROUND + 1, chosen[0].shape
        starts = (min(max(at - AROUND, 0), max(most - side, 0)) for at, most in ((column, columns), (row, rows)))
        across, down = (slice(start * scale, (start + side) * scale) for start in starts)
        kept = sum(layer[row, column] for layer in chosen)
        pair[0].set_title(f"row {row + 1}, column {column + 1}", fontsize=8)
        pair[1].set_title(f"kept by {kept} of {len(chosen)} layers", fontsize=8)
        for axis, shown in zip(pair, (picture, faded), strict=True):
            axis.imshow(shown[down, across])
            axis.set_axis_off()


def draw_kept_strips(
    path: Path, image: Image.Image, kept: Mapping[int, torch.Tensor], prompt_length: int, title: str = ""
) -> None:
    """Write a picture of the image beside one strip per layer, on which the kept prompt positions are marked.

    For prompts whose image tokens are not one known rectangle of patches. Arguments as for `draw_kept_patches`.
    """
    figure = Figure(figsize=(10, max(3.0, 0.25 * len(kept) + 1)), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)  # an answer may hold dollar signs
    left, right = figure.subplots(1, 2, width_ratios=(1, 3))
    left.imshow(np.asarray(image.convert("RGB")))
    left.set_axis_off()
    marks = np.empty((len(kept), prompt_length, 3))
    marks[:] = DROPPED_COLOUR
    for row, positions in enumerate(kept.values()):
        marks[row, positions.cpu().numpy()] = KEPT_COLOUR
    right.imshow(marks, aspect="auto", interpolation="nearest")
    labels = [f"layer {layer}: {_count(positions, prompt_length)}" for layer, positions in kept.items()]
    right.set_yticks(range(len(kept)), labels, fontsize=7)
    right.tick_params(axis="x", labelsize=7)
    right.set_xlabel("position in the prompt (tokens); dark: kept", fontsize=8)
    _save(figure, path)


def _panels(figure: Figure | SubFigure, count: int) -> list:
    columns = min(count, MAX_COLUMNS)
    axes = list(np.atleast_1d(figure.subplots(math.ceil(count / columns), columns)).flat)
    for axis in axes:
        axis.set_axis_off()
    return axes


def _fade(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Fade the pixels outside `kept` `[H, W]` of `picture` `[H, W, 3]` to a pale grey."""
    pale = 0.8 + 0.2 * picture.mean(axis=2, keepdims=True)
    return np.where(kept[..., None], picture, pale)


def _count(positions: torch.Tensor, prompt_length: int) -> str:
    return f"{positions.numel()} of {prompt_length} tokens ({positions.numel() / prompt_length:.0%})"


def _save(figure: Figure, path: Path) -> None:
    # The Agg canvas is made here, so that no global backend is chosen and no display is needed.
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.1)
