"""Which tokens of a prompt are text, and which part of which image or video frame the others stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from zipvl_compile.demo.panel import Panel, modality_positions, picture_of, pooled_grid, vision_setting
from zipvl_compile.demo.tiles import anyres_panels, padded_panels, tile_panels

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """The tokens of one prompt.

    Attributes:
        length: of the prompt (tokens).
        panels: the rectangles of image tokens, in order.
        visual: positions of all image and video tokens, int64 `[V]`.
        unplaced: those of them whose place in a picture cannot be told, int64 `[U]`.
        text: positions of the other tokens, int64 `[T]`.
        words: these tokens, decoded.
    """

    length: int
    panels: list[Panel]
    visual: torch.Tensor
    unplaced: torch.Tensor
    text: torch.Tensor
    words: list[str]


def layout_of(
    config: Any,
    processor: Any,
    inputs: Inputs,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
) -> Layout:
    """Find the images and video frames in a prompt.

    Where the number of tokens is not what a known way to lay them out gives, they are `unplaced`: no wrong place is
    named.

    Args:
        config: of the model.
        processor: of the model.
        inputs: of one prompt: `input_ids [1, n]`, pixels, grids.
        images: of the prompt, RGB.
        videos: of the prompt: the frames that the processor took.

    Raises:
        ValueError: more than one prompt.
    """
    ids = inputs["input_ids"]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"inputs: expected one prompt, input_ids of [1, n], got {list(ids.shape)}. Draw one by one.")
    image, video = (modality_positions(config, inputs, kind) for kind in ("image", "video"))
    names = _numbered("image", len(images))
    if videos and not video.numel():  # frames of a video that go the way of images
        for name, frames in zip(_numbered("video", len(videos)), videos, strict=True):
            names += [f"{name}, frame {i + 1}" for i in range(len(frames))]
    placed: list[Panel] = []
    unplaced = []
    for positions, panels in (
        (image, _image_panels(config, processor, inputs, image, images, names) if image.numel() else []),
        (video, _video_panels(config, processor, inputs, video, videos) if video.numel() else []),
    ):
        if panels is None:
            unplaced.append(positions)
        placed += panels or []
    visual = torch.cat([image, video]).sort().values
    text = torch.arange(ids.shape[1])
    text = text[~torch.isin(text, visual)]
    nothing = torch.empty(0, dtype=torch.int64)
    words = [_word(processor, token) for token in ids[0, text.to(ids.device)].tolist()]
    return Layout(ids.shape[1], placed, visual, torch.cat([nothing, *unplaced]), text, words)


def _numbered(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind} {i + 1}" for i in range(count)]


def _word(processor: Any, token: int) -> str:
    """Return one token as it would be printed, blanks and line ends made visible."""
    decode = getattr(getattr(processor, "tokenizer", processor), "decode", None)
    text = str(token) if decode is None else str(decode([token]))
    return text.strip() or repr(text)[1:-1].replace(" ", "\u2423")


def _image_panels(
    config: Any, processor: Any, inputs: Inputs, positions: torch.Tensor, images: Sequence, names: Sequence[str]
) -> list[Panel] | None:
    settings = getattr(processor, "image_processor", None)
    if "image_grid_thw" in inputs:
        merges = inputs.get("image_merge_sizes")
        grids = _merged(config, inputs["image_grid_thw"], merges)
        if any(frames != 1 for frames, *_ in grids):
            return None
        pictures = list(images) if len(images) == len(grids) else [None] * len(grids)
        titles = names if len(names) == len(grids) else _numbered("image", len(grids))
        return _split(positions, grids, [[name] for name in titles], [[one] for one in pictures])
    for panels_of in (anyres_panels, padded_panels, tile_panels):
        panels = panels_of(config, settings, inputs, positions, names)
        if panels is not None:
            return panels
    return None


def _merged(config: Any, grids: torch.Tensor, merges: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """Return frames, rows and columns of the tokens, of patches `[N, 3]` that are merged before the decoder."""
    own = [vision_setting(config, "spatial_merge_size") or 1] * len(grids) if merges is None else merges.tolist()
    return [(t, h // m, w // m) for (t, h, w), m in zip(grids.tolist(), own, strict=True)]


def _split(
    positions: torch.Tensor, grids: Sequence[tuple[int, int, int]], names: Sequence, pictures: Sequence
) -> list[Panel] | None:
    """Return a panel for every frame of every grid; None where there are more or fewer tokens than they have."""
    counts = [math.prod(grid) for grid in grids]
    if sum(counts) != positions.numel():
        return None
    return [
        Panel(name, picture, frame)
        for own, grid, titles, shown in zip(positions.split(counts), grids, names, pictures, strict=True)
        for frame, name, picture in zip(own.view(grid), titles, shown, strict=True)
    ]


def _video_panels(
    config: Any, processor: Any, inputs: Inputs, positions: torch.Tensor, videos: Sequence[Sequence[Image.Image]]
) -> list[Panel] | None:
    pixels = inputs.get("pixel_values_videos")
    if "video_grid_thw" in inputs:
        grids = _merged(config, inputs["video_grid_thw"], inputs.get("video_merge_sizes"))
        known: list[list[Image.Image | None]] = [[]] * len(grids)
        if len(videos) == len(grids):
            known = [list(frames) for frames in videos]
        titles: list[list[str]] = []
        shown: list[list[Image.Image | None]] = []
        for name, frames, (steps, *_) in zip(_numbered("video", len(grids)), known, grids, strict=True):
            # Several frames make one step; the last step may be filled up.
            each = math.ceil(len(frames) / steps)
            firsts = [i * each for i in range(steps)] if steps and (steps - 1) * each < len(frames) else []
            lasts = [min(first + each, len(frames)) for first in firsts]
            titles.append(
                [
                    f"{name}, frame {first + 1}" if last == first + 1 else f"{name}, frames {first + 1}-{last}"
                    for first, last in zip(firsts, lasts, strict=True)
                ]
                or [f"{name}, step {i + 1}" for i in range(steps)]
            )
            shown.append([frames[first] for first in firsts] or [None] * steps)
        return _split(positions, grids, titles, shown)
    if pixels is None or pixels.dim() != 5 or not len(pixels):
        return None
    count, steps = pixels.shape[:2]
    each, end = divmod(positions.numel() // count, steps)
    grid = pooled_grid(config, pixels.shape[-2], pixels.shape[-1], each)
    # LLaVA-OneVision puts one token behind the last frame.
    if grid is None or end > 1 or positions.numel() % count:
        return None
    settings = getattr(processor, "video_processor", None) or getattr(processor, "image_processor", None)
    return [
        Panel(f"{name}, frame {i + 1}", picture_of(frame, settings), own)
        for name, frames, tokens in zip(_numbered("video", count), pixels, positions.view(count, -1), strict=True)
        for i, (frame, own) in enumerate(zip(frames, tokens[: steps * each].view(steps, *grid), strict=True))
    ]
