"""Load a Hugging Face LVLM, and turn images, videos and a text into its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from zipvl_compile.demo.media import Video
from zipvl_compile.demo.media import read_image as read_image
from zipvl_compile.demo.panel import modality_positions


def load(name: str, device: str | None = None) -> tuple[Any, Any]:
    """Load a model for inference, in its own dtype, and its processor.

    Args:
        name: local folder or name on the Hugging Face hub.
        device: None takes CUDA where there is one.

    Raises:
        ValueError: no model and processor of that name, or no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one of this machine, got {device!r} ({why}). Leave it out.") from error
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"model: expected a local folder or a Hugging Face hub name of an image-text-to-text model with its "
            f"processor, got {name!r} ({why}). Check the path or the name."
        ) from error
    return model.eval().to(device), processor


def prompt_inputs(
    processor: Any,
    images: Image.Image | Sequence[Image.Image],
    text: str,
    device: Any = "cpu",
    videos: Sequence[Video] = (),
) -> dict[str, torch.Tensor]:
    """Return the model's inputs for images, videos and one text.

    Args:
        processor: of the model; its chat template is used where it has one.
        images: RGB, one or several.
        text: what to ask; tokens of images and videos are put in front where they are missing.
        device: where the tensors go.
        videos: all their frames are taken.

    Raises:
        ValueError: the processor takes no videos, or the text names more images than there are.
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    if videos and getattr(processor, "video_processor", None) is None:
        raise ValueError(
            f"videos: expected none, since {type(processor).__name__} has no video processor. Pass frames as images."
        )
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    else:
        missing = [_missing(processor, "image", len(images), text), _missing(processor, "video", len(videos), text)]
        text = " ".join([*filter(None, missing), text])
    given: dict[str, Any] = {}
    if images:
        given["images"] = images[0] if len(images) == 1 else images
    if videos:
        given["videos"] = [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
        given["video_metadata"] = [
            {"total_num_frames": video.total, "fps": video.fps, "frames_indices": video.numbers} for video in videos
        ]
        given["do_sample_frames"] = False
    return dict(processor(**given, text=text, return_tensors="pt").to(device))


def _missing(processor: Any, kind: str, count: int, text: str) -> str:
    """Return the tokens of images or videos that a text lacks."""
    token = _token(processor, kind)
    if token is None:
        return ""
    found = text.count(token)
    if found > count:
        raise ValueError(f"prompt: expected {token} at most {count} times, once a given {kind}, got {found} of them.")
    return " ".join([token] * (count - found))


def _token(processor: Any, kind: str) -> str | None:
    for owner in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(owner, f"{kind}_token", None)
        if token is not None:
            return str(token)
    return None


def image_positions(config: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return where the image tokens of a one-sample prompt stand: int64 `[number of image tokens]`."""
    return modality_positions(config, inputs, "image")
