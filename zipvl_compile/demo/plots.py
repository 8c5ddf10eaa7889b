"""Which image patches each decoder layer kept, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

PANEL_INCHES = 2.6
MAX_COLUMNS = 6
PICTURE_PIXELS = 512
KEPT_COLOUR, DROPPED_COLOUR = (0.10, 0.35, 0.65), (0.92, 0.92, 0.92)


def draw_kept_patches(
    path: Path,
    image: Image.Image,
    kept: Mapping[int, torch.Tensor],
    image_tokens: torch.Tensor,
    grid: tuple[int, int],
    prompt_length: int,
    title: str = "",
) -> None:
    """Write a picture with one panel per layer, in which the patches that the layer dropped are faded.

    Args:
        path: of the PNG.
        image: as the model sees it.
        kept: positions of the kept prompt tokens, int64 `[P]`, by layer number.
        image_tokens: positions of the image tokens in the prompt, int64 `[rows * columns]`, in reading order.
        grid: rows and columns of patches.
        prompt_length: of the prompt (tokens).
        title: above the panels.
    """
    rows, columns = grid
    scale = max(1, PICTURE_PIXELS // max(grid))
    picture = np.asarray(image.convert("RGB").resize((columns * scale, rows * scale), Image.Resampling.NEAREST)) / 255
    figure, axes = _panels(1 + len(kept), rows / columns)
    figure.suptitle(title, fontsize=10, parse_math=False)  # an answer may hold dollar signs
    axes[0].imshow(picture)
    axes[0].set_title(f"image: {rows} x {columns} patches", fontsize=9)
    for (layer, positions), axis in zip(kept.items(), axes[1:], strict=False):
        chosen = torch.isin(image_tokens, positions.cpu()).reshape(rows, columns)
        axis.imshow(_fade(picture, chosen.numpy().repeat(scale, 0).repeat(scale, 1)))
        patches = f"{int(chosen.sum())} of {rows * columns} patches"
        axis.set_title(f"layer {layer}: kept {patches}\n{_count(positions, prompt_length)}", fontsize=9)
    _save(figure, path)


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


def _panels(count: int, aspect: float) -> tuple[Figure, list]:
    columns = min(count, MAX_COLUMNS)
    rows = math.ceil(count / columns)
    size = (PANEL_INCHES * columns, (PANEL_INCHES * aspect + 0.5) * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


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
