"""The parts of the picture of kept tokens, each a function that draws onto a figure at a height in inches."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Circle, Patch, PathPatch
from matplotlib.path import Path as Outline
from PIL import Image

from zipvl_compile.demo.panel import Panel

WIDTH, MARGIN = 12.0, 0.15  # inches; 1200 pixels at 100 a inch
PICTURE_PIXELS, SMALL_PIXELS = 768, 384  # longer side, of one panel and of several
MOST_COLUMNS = {1: 5, 2: 6, 3: 6}  # cells beside each other, by panels of a layer; where there are more, as many
TALLEST = 3.4  # cell, inches
CELL_TITLE, VIEW_TITLE = 0.34, 0.24
AROUND = 2  # tokens on each side of an enlarged one
DROPPED, HATCH, LINES = "#E4E4E4", "////////", "#9A9A9A"


def shares(positions: torch.Tensor, of: torch.Tensor) -> np.ndarray:
    """Return the share of a layer's selections that keep each token, in [0, 1].

    Args:
        positions: kept by the layer, int64 `[P]`, or `[G, P]` where groups of heads select on their own.
        of: positions of tokens, int64 of any shape.

    Returns:
        float64 of the shape of `of`.
    """
    groups = positions.cpu().view(-1, positions.shape[-1])
    return np.mean([torch.isin(of, group).numpy() for group in groups], axis=0)


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes at a place in inches from the left and from the top."""
    _, tall = figure.get_size_inches()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / tall, width / WIDTH, height / tall))


def write(figure: Figure, left: float, top: float, text: str, size: float, **more: object) -> None:
    """Write a text as it is, its upper left corner at a place in inches."""
    tall = figure.get_size_inches()[1]
    # An answer or a token may hold dollar signs, which is no formula.
    figure.text(left / WIDTH, 1 - top / tall, text, size=size, va="top", parse_math=False, **more)  # type: ignore[arg-type]


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """Return a text in lines of at most `width` characters, the end left out where it has more than `lines`."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ...", break_on_hyphens=False))


class Header:
    """The title, lines below it, and what the colours of the panels mean."""

    def __init__(self, title: str, lines: Sequence[str], panels: bool) -> None:
        self.title = wrapped(title, 112)
        self.lines = [wrapped(line, 148) for line in lines if line]
        self.panels = panels
        rows = sum(line.count("\n") + 1 for line in self.lines)
        self.height = 0.15 + 0.24 * (self.title.count("\n") + 1) + 0.19 * rows + (0.4 if panels else 0.1)

    def draw(self, figure: Figure, top: float) -> None:
        write(figure, MARGIN, top + 0.12, self.title, 13, weight="bold")
        top += 0.15 + 0.24 * (self.title.count("\n") + 1)
        write(figure, MARGIN, top + 0.02, "\n".join(self.lines), 10, linespacing=1.25)
        if self.panels:
            tall = figure.get_size_inches()[1]
            colours = ("#D55E00", "#56B4E9", "#009E73")
            handles: Any = [
                tuple(Patch(facecolor=one, edgecolor="black", linewidth=0.5) for one in colours),
                Patch(facecolor=DROPPED, edgecolor=LINES, hatch=HATCH, linewidth=0.5),
            ]
            said = [
                "as it is: kept in the KV cache of the layer",
                "pale and hatched: left out of it",
            ]
            figure.legend(
                handles, said, loc="lower left", ncols=2, frameon=False, fontsize=9.5, borderaxespad=0.2,
                handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
                bbox_to_anchor=(MARGIN / 2 / WIDTH, 1 - (self.height - 0.04) / tall),
            )  # fmt: skip


class Views:
    """The panels as they are, and once for every layer, with what it dropped pale and hatched."""

    def __init__(
        self, panels: Sequence[Panel], layers: Mapping[int, torch.Tensor], length: int, cells: Sequence[tuple[int, int]]
    ) -> None:
        self.panels, self.layers, self.length, self.cells = panels, layers, length, cells
        count = len(panels)
        views = 1 + len(layers)
        self.across = max(1, min(views, MOST_COLUMNS.get(count, count) // count))
        self.width = (WIDTH - MARGIN) / (self.across * count) - MARGIN
        tallest = max(self.width * one.positions.shape[0] / one.positions.shape[1] for one in panels)
        self.cell = min(tallest, TALLEST)
        self.row = VIEW_TITLE + CELL_TITLE + self.cell + 0.2
        self.height = self.row * math.ceil(views / self.across)
        self.pictures = [as_array(panel, PICTURE_PIXELS if count == 1 else SMALL_PIXELS) for panel in panels]

    def draw(self, figure: Figure, top: float) -> None:
        group = len(self.panels) * (self.width + MARGIN)
        for number, layer in enumerate([None, *self.layers]):
            left = MARGIN + (number % self.across) * group
            above = top + (number // self.across) * self.row
            if layer is None:
                title = "what the model sees"
            else:
                title = f"layer {layer}: {self.layers[layer].shape[-1] / self.length:.0%} of prompt kept"
            write(figure, left, above + 0.08, title, 9, weight="bold")
            for i, panel in enumerate(self.panels):
                across = left + i * (self.width + MARGIN)
                axes = place(figure, across, above + VIEW_TITLE + CELL_TITLE, self.width, self.cell)
                axes.set_anchor("NW")
                axes.set_label(f"{title} | {panel.name}")
                self._panel(axes, i, None if layer is None else shares(self.layers[layer], panel.positions))

    def _panel(self, axes: Axes, number: int, kept: np.ndarray | None) -> None:
        panel = self.panels[number]
        rows, columns = panel.positions.shape
        size = 8 if len(self.panels) < 6 else 7
        if kept is None:
            said = f"{panel.name}\n{rows} x {columns} tokens"
            axes.imshow(self.pictures[number], extent=(0, columns, rows, 0))
            for row, column in self.cells if number == 0 else ():
                radius = max(2.5, columns / 40)
                axes.add_patch(Circle((column + 0.5, row + 0.5), radius, fill=False, edgecolor="white", linewidth=1.2))
        else:
            said = f"{panel.name}\n{kept.sum():.0f} of {kept.size} kept ({kept.mean():.0%})"
            show_kept(axes, self.pictures[number], kept)
        axes.set_title(said, fontsize=size, loc="left", pad=3, parse_math=False)
        _frame(axes)


def as_array(panel: Panel, pixels: int = PICTURE_PIXELS) -> np.ndarray:
    """Return the picture of a panel, float64 `[rows * k, columns * k, 3]` in [0, 1]; grey where it has none."""
    rows, columns = panel.positions.shape
    scale = max(1, pixels // max(rows, columns))
    picture = panel.picture or Image.new("RGB", (columns, rows), "#B0B0B0")
    return np.asarray(picture.convert("RGB").resize((columns * scale, rows * scale), Image.Resampling.BOX)) / 255


def show_kept(axes: Axes, picture: np.ndarray, kept: np.ndarray) -> None:
    """Show a picture `[rows * k, columns * k, 3]` with what was dropped pale, and hatched where no head kept it.

    Args:
        axes: where one token is one unit wide and high.
        picture: in [0, 1].
        kept: share that keeps each token, `[rows, columns]`.
    """
    rows, columns = kept.shape
    scale = picture.shape[0] // rows
    share = kept.repeat(scale, 0).repeat(scale, 1)[..., None]
    pale = 0.8 + 0.2 * picture.mean(axis=2, keepdims=True)
    axes.imshow(share * picture + (1 - share) * pale, extent=(0, columns, rows, 0))
    gone = np.argwhere(kept == 0)[:, None, ::-1]  # x before y
    if len(gone):
        corners = gone + np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
        outline = Outline.make_compound_path_from_polys(corners.astype(float))
        axes.add_patch(PathPatch(outline, fill=False, hatch=HATCH, edgecolor=LINES, linewidth=0))


def _frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)


class Enlarged:
    """What is around some tokens of the first panel, and below it the same, paler the fewer of the layers kept it."""

    def __init__(self, panel: Panel, layers: Mapping[int, torch.Tensor], cells: Sequence[tuple[int, int]]) -> None:
        self.panel, self.cells, self.count = panel, cells, len(layers)
        self.kept = np.mean([shares(positions, panel.positions) for positions in layers.values()], axis=0)
        self.width = min(1.3, (WIDTH - MARGIN) / (2 * len(cells)) - MARGIN)
        self.height = self.width + 0.75

    def draw(self, figure: Figure, top: float) -> None:
        title = "the circled parts, enlarged: as they are, and as the layers kept them (the paler, the fewer of them)"
        write(figure, MARGIN, top + 0.04, title, 10, weight="bold")
        side = 2 * AROUND + 1
        rows, columns = self.kept.shape
        picture = as_array(self.panel)
        scale = picture.shape[0] // rows
        group = (WIDTH - MARGIN) / len(self.cells)
        for number, (row, column) in enumerate(self.cells):
            starts = (min(max(at - AROUND, 0), max(most - side, 0)) for at, most in ((row, rows), (column, columns)))
            down, across = (slice(start, start + side) for start in starts)
            part = picture[down.start * scale : down.stop * scale, across.start * scale : across.stop * scale]
            axes = [
                place(figure, MARGIN + number * group + i * (self.width + 0.05), top + 0.58, self.width, self.width)
                for i in range(2)
            ]
            kept = self.kept[down, across]
            axes[0].imshow(part, extent=(0, kept.shape[1], kept.shape[0], 0))
            show_kept(axes[1], part, kept)
            axes[0].set_title(f"row {row + 1}\ncolumn {column + 1}", fontsize=8, loc="left", pad=3)
            shown = round(self.kept[row, column] * self.count)
            axes[1].set_title(f"kept by\n{shown} of {self.count} layers", fontsize=8, loc="left", pad=3)
            for one in axes:
                one.set_anchor("NW")
                _frame(one)
