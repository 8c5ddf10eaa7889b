"""Scenes: a few coloured handwritten digits on a noisy canvas.

Every digit fills one cell of a canvas, and a cell is exactly one patch of the vision tower, so that a
scene costs as many image tokens as the canvas has cells, of which only a handful matter.  The digits
are the real ones of scikit-learn's ``load_digits``; a fixed fifth of them is held out from training.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from zipvl_compile.demo.tiny_lvlm.canvas import CELL, SMALL, Canvas

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.85, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.95, 0.1),
    "magenta": (0.95, 0.1, 0.9),
    "cyan": (0.1, 0.9, 0.9),
    "white": (1.0, 1.0, 1.0),
    "orange": (1.0, 0.55, 0.1),
}
COLOUR_NAMES = tuple(COLOURS)
MIN_DIGITS, MAX_DIGITS = 3, 6

SPLIT_SEED = 0
HELD_OUT_FRACTION = 0.2
AUGMENTED_COPIES = 15
BACKGROUND = (0.15, 0.30)
NOISE = 0.08

Split = Literal["train", "held_out"]


@dataclass(frozen=True, order=True)
class PlacedDigit:
    """One digit of a scene; ordering by (row, column) is reading order."""

    row: int
    column: int
    digit: int
    colour: str


@dataclass(frozen=True)
class Layout:
    """What is on a picture, before it is drawn; ``digits`` in reading order.

    ``ink``: float32 (digits, CELL, CELL, 3), opacity and colour in one; ``opacity``: float32 (digits, CELL, CELL, 1);
    ``background``: float32 (3,).  Both follow the order of ``cells``, int64 (digits,).
    """

    canvas: Canvas
    digits: tuple[PlacedDigit, ...]
    cells: np.ndarray
    ink: np.ndarray
    opacity: np.ndarray
    background: np.ndarray


@dataclass(frozen=True)
class Scene:
    """``image``: uint8 array (size, size, 3); ``digits``: what is on it, in reading order."""

    image: np.ndarray
    digits: tuple[PlacedDigit, ...]
    canvas: Canvas = SMALL


@dataclass(frozen=True)
class DigitPool:
    """Digits to draw from: ``images`` float32 (n, CELL, CELL) in [0, 1], ``labels`` int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray


def split_indices() -> dict[Split, np.ndarray]:
    """Row numbers of ``load_digits`` for each split; the two arrays share no element."""
    count = len(_load_digits()[1])
    order = np.random.RandomState(SPLIT_SEED).permutation(count)
    held_out = round(count * HELD_OUT_FRACTION)
    return {"train": order[:-held_out], "held_out": order[-held_out:]}


@lru_cache(maxsize=2)
def digit_pool(split: Split) -> DigitPool:
    """The digits of one split; the training pool also holds slightly rotated, scaled and shifted copies."""
    images, labels = _load_digits()
    rows = split_indices()[split]
    images, labels = images[rows], labels[rows]
    if split == "held_out":
        return DigitPool(images, labels)
    rng = np.random.default_rng(SPLIT_SEED)
    copies = [np.stack([_jitter(image, rng) for image in images]) for _ in range(AUGMENTED_COPIES)]
    return DigitPool(np.concatenate([images, *copies]), np.tile(labels, 1 + AUGMENTED_COPIES))


def draw_scene(
    rng: np.random.Generator,
    split: Split = "train",
    min_digits: int = MIN_DIGITS,
    max_digits: int = MAX_DIGITS,
    canvas: Canvas = SMALL,
) -> Scene:
    """Draw one scene with ``min_digits`` to ``max_digits`` digits in distinct cells.

    Colours are distinct as long as there are enough of them; beyond that they repeat.
    """
    layout, grid = draw_layout(rng, split, min_digits, max_digits, canvas), canvas.grid
    cells = _cells(layout, np.arange(canvas.tokens)).reshape(grid, grid, CELL, CELL, 3)
    pixels = cells.transpose(0, 2, 1, 3, 4).reshape(canvas.size, canvas.size, 3)
    return Scene(_as_bytes(pixels, rng), layout.digits, canvas)


def draw_layout(rng: np.random.Generator, split: Split, min_digits: int, max_digits: int, canvas: Canvas) -> Layout:
    """Draw what is on a scene, as ``draw_scene`` does, and not its pixels."""
    pool, grid = digit_pool(split), canvas.grid
    count = int(rng.integers(min_digits, max_digits + 1))
    cells = rng.permutation(canvas.tokens)[:count]
    colours = np.concatenate([rng.permutation(len(COLOUR_NAMES)) for _ in range(-(-count // len(COLOUR_NAMES)))])[
        :count
    ]
    picks = rng.integers(len(pool.labels), size=count)
    opacity = pool.images[picks][..., None]
    digits = (
        PlacedDigit(int(cell // grid), int(cell % grid), int(pool.labels[pick]), COLOUR_NAMES[colour])
        for cell, pick, colour in zip(cells, picks, colours, strict=True)
    )
    background = rng.uniform(*BACKGROUND, size=3).astype(np.float32)
    ink = opacity * _PALETTE[colours][:, None, None]
    return Layout(canvas, tuple(sorted(digits)), cells, ink, opacity, background)


def draw_patches(rng: np.random.Generator, layout: Layout, patches: np.ndarray) -> np.ndarray:
    """Draw some patches of a scene only: uint8 (n, CELL, CELL, 3), for patch numbers (n,)."""
    return _as_bytes(_cells(layout, patches), rng)


def _cells(layout: Layout, patches: np.ndarray) -> np.ndarray:
    """The cells of some patches without noise, float32 (n, CELL, CELL, 3)."""
    of_digit = np.full(layout.canvas.tokens, -1)
    of_digit[layout.cells] = np.arange(len(layout.cells))
    cells = np.broadcast_to(layout.background, (len(patches), CELL, CELL, 3)).copy()
    there = np.flatnonzero(of_digit[patches] >= 0)
    which = of_digit[patches[there]]
    cells[there] = layout.ink[which] + (1 - layout.opacity[which]) * layout.background
    return cells


def _as_bytes(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels with noise, rounded: the processor sees 8-bit pictures, so training must see the same."""
    pixels = pixels + NOISE * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


_PALETTE = np.array(list(COLOURS.values()), np.float32)


@lru_cache(maxsize=1)
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All of ``load_digits``: images float32 (1797, 8, 8) in [0, 1] and labels int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The handwritten digits come from scikit-learn, which is not installed: pip install zipvl-compile[demo]"
        ) from error
    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


def _jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A randomly rotated, scaled and shifted copy of one (CELL, CELL) image, for training only."""
    from scipy.ndimage import affine_transform  # scikit-learn depends on scipy

    angle = np.deg2rad(rng.uniform(-12, 12))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn / rng.uniform(0.9, 1.1, size=(2, 1))
    centre = (CELL - 1) / 2
    offset = centre - matrix @ np.full(2, centre) + rng.uniform(-0.5, 0.5, size=2)
    return affine_transform(image, matrix, offset=offset, order=1).astype(np.float32)
