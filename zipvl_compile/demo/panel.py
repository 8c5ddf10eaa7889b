"""A rectangle of image tokens, and the picture that they stand for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Panel:
    """What a rectangle of image tokens shows.

    Attributes:
        name: for people, such as "image 2" or "video 1, frames 3-4".
        picture: what the rectangle covers, edge to edge; None where it cannot be told.
        positions: where the tokens stand in the prompt, int64 `[rows, columns]`, as they lie in the picture.
    """

    name: str
    picture: Image.Image | None
    positions: torch.Tensor


def picture_of(pixels: torch.Tensor, settings: Any) -> Image.Image:
    """Return normalised pixels as a picture.

    Args:
        pixels: `[3, H, W]`, as a processor gives them to a model.
        settings: the image or video processor; where it has no mean, the darkest pixel becomes black and the brightest
            white.
    """
    colours = pixels.float().cpu().permute(1, 2, 0).numpy()
    mean, std = getattr(settings, "image_mean", None), getattr(settings, "image_std", None)
    if mean is not None and std is not None:
        colours = colours * np.array(std) + np.array(mean)
    else:
        low, high = float(colours.min()), float(colours.max())
        colours = (colours - low) / max(high - low, 1e-6)
    return Image.fromarray(np.rint(colours.clip(0, 1) * 255).astype(np.uint8))


def vision_setting(config: Any, name: str) -> int | None:
    """Return a number of the vision tower's config, of a square where it has two; None where it has none."""
    value = getattr(getattr(config, "vision_config", None), name, None)
    if isinstance(value, (list, tuple)):
        value = value[0] if len(set(value)) == 1 else None
    return value if isinstance(value, int) and value > 0 else None


def pooled_grid(config: Any, height: int, width: int, tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of the tokens of an image, or None where they are not its patches, pooled m x m.

    Args:
        config: of the model.
        height: of the image (pixels).
        width: of the image (pixels).
        tokens: that the image has.
    """
    patch = vision_setting(config, "patch_size")
    # Queries that read the whole image stand for no place in it, and their number may still be a square.
    if patch is None or any(hasattr(config, name) for name in ("perceiver_config", "qformer_config")):
        return None
    rows, columns = height // patch, width // patch
    for pool in range(1, min(rows, columns) + 1):
        for rounded in (math.floor, math.ceil):
            if (grid := (rounded(rows / pool), rounded(columns / pool)))[0] * grid[1] == tokens:
                return grid
    return None


def run_lengths(positions: torch.Tensor) -> list[int]:
    """Return how many positions follow each other without a gap: of ascending int64 `[n]`."""
    ends = (positions.diff() != 1).nonzero().flatten() + 1
    edges = [0, *ends.tolist(), positions.numel()]
    return [b - a for a, b in itertools.pairwise(edges) if b > a]


def modality_positions(config: Any, inputs: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
    """Return where the tokens of images, or of videos, stand in a prompt.

    Args:
        config: of the model.
        inputs: of one prompt, batch 1.
        kind: "image" or "video".

    Returns:
        int64 `[number of tokens]`, ascending.
    """
    ids = inputs["input_ids"][0]
    tokens = [getattr(config, f"{one}_token_{end}", None) for one in ("image", "video") for end in ("id", "index")]
    found = torch.isin(ids, torch.tensor([t for t in tokens if t is not None], dtype=ids.dtype, device=ids.device))
    types = inputs.get("mm_token_type_ids")
    if types is not None:  # some families mark the frames of a video by the token of images
        found &= types[0] == (1 if kind == "image" else 2)
    else:
        own = tokens[:2] if kind == "image" else tokens[2:]
        found &= torch.isin(ids, torch.tensor([t for t in own if t is not None], dtype=ids.dtype, device=ids.device))
    return found.nonzero().flatten().cpu()
