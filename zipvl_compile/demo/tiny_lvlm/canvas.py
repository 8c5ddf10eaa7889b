"""The two canvases: how many cells a picture has, and the words that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

CELL = 8  # pixels


@dataclass(frozen=True)
class Canvas:
    """``grid`` x ``grid`` cells of ``CELL`` x ``CELL`` pixels; a cell is a patch, and a patch is an image token."""

    name: str
    grid: int

    @property
    def size(self) -> int:
        """Width and height (pixels)."""
        return self.grid * CELL

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.grid**2

    @property
    def is_large(self) -> bool:
        """Whether a picture has thousands of patches, for which the model is built otherwise."""
        return self.tokens > 1024

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The words for its rows, from the top."""
        return tuple(f"r{row + 1}" for row in range(self.grid))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The words for its columns, from the left."""
        return tuple(f"c{column + 1}" for column in range(self.grid))


SMALL, LARGE = Canvas("small", 16), Canvas("large", 96)
CANVASES = {canvas.name: canvas for canvas in (SMALL, LARGE)}


def canvas_of(config: Any) -> Canvas:
    """Return the canvas that a LLaVA of ``build`` sees, by its configuration."""
    return next(canvas for canvas in CANVASES.values() if canvas.tokens == config.image_seq_length)
