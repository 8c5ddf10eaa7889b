"""Read images, and videos or folders of their frames, for a prompt."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

#: Most frames that a prompt takes of a video.
FRAMES = 16
#: What transformers decodes with, by the package's name.
DECODERS = {"torchcodec": "torchcodec", "av": "pyav", "cv2": "opencv", "decord": "decord"}


@dataclass(frozen=True)
class Video:
    """Frames of a video, evenly chosen.

    Attributes:
        frames: RGB, all of one size.
        numbers: of these frames in the video, from 0.
        total: frames of the video.
        fps: frames per second of the video, None where that is not known.
    """

    frames: list[Image.Image]
    numbers: list[int]
    total: int
    fps: float | None = None


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        ValueError: no image there, or one that is larger than PIL opens.
    """
    try:
        return Image.open(path).convert("RGB")
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"image: expected at most {most} pixels, got more in {str(path)!r} ({error}). Make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    except OSError as error:
        raise ValueError(f"image: expected an image file, got {str(path)!r} ({error}). Check the path.") from error


def evenly(total: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0 to `total - 1`, evenly chosen, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int)).tolist()


def read_video(path: Path, most: int = FRAMES) -> Video:
    """Read at most `most` frames of a video.

    Args:
        path: a folder of frames, which are taken in the order of their names, numbers in these by value; an animated
            picture; or a video file, for which transformers needs torchcodec, av, opencv or decord.
        most: frames to take.

    Raises:
        ValueError: no frames there, frames of different sizes, or a file that nothing installed decodes.
    """
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if _is_image(file)), key=_natural)
        if not files:
            raise ValueError(f"video: expected frames as image files, got none in {str(path)!r}. Put frames there.")
        numbers = evenly(len(files), most)
        return Video(_of_one_size(path, [read_image(files[i]) for i in numbers]), numbers, len(files))
    if not path.exists():
        raise ValueError(f"video: expected a folder of frames or a video file, got {str(path)!r}. Check the path.")
    try:
        with Image.open(path) as animation:
            total = getattr(animation, "n_frames", 1)
            numbers = evenly(total, most)
            chosen = [one.convert("RGB") for i, one in enumerate(ImageSequence.Iterator(animation)) if i in numbers]
            duration = animation.info.get("duration")  # ms a frame
        return Video(chosen, numbers, total, 1000 / duration if duration else None)
    except UnidentifiedImageError:
        return _decoded(path, most)


def read_media(images: Sequence[Path], videos: Sequence[Path], most: int) -> tuple[list[Image.Image], list[Video]]:
    """Return images, and videos of at most `most` frames each; see `read_image` and `read_video`."""
    return [read_image(path) for path in images], [read_video(path, most) for path in videos]


def _decoded(path: Path, most: int) -> Video:
    from transformers.video_utils import load_video

    backends = [backend for package, backend in DECODERS.items() if importlib.util.find_spec(package)]
    if not backends:
        raise ValueError(
            f"video: expected a folder of frames, since nothing that decodes a video is installed, got {str(path)!r}. "
            "Run pip install av (or torchcodec), or pass a folder of its frames."
        )
    why: Exception | None = None
    for backend in backends:  # one may be installed, and still lack the libraries it needs
        try:
            frames, found = load_video(
                str(path),  # type: ignore[arg-type]
                backend=backend,
                sample_indices_fn=lambda metadata, **given: np.array(evenly(metadata.total_num_frames, most)),
            )
        except Exception as error:
            why = error
            continue
        shown = [Image.fromarray(np.asarray(frame)).convert("RGB") for frame in frames]
        return Video(shown, [int(i) for i in found.frames_indices], int(found.total_num_frames), found.fps)
    raise ValueError(f"video: expected a video file, got {str(path)!r} ({why}). Pass a folder of its frames.") from why


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Return a key by which frame2 comes before frame10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name) if part]


def _of_one_size(path: Path, frames: Sequence[Image.Image]) -> list[Image.Image]:
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ValueError(
            f"video: expected frames of one size, got {sorted(sizes)} in {str(path)!r}. Make them equal, or pass them "
            "as images."
        )
    return list(frames)
