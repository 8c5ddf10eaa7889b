"""Load a Hugging Face LVLM, turn an image and a text into its inputs, and find the image in them again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


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


def prompt_inputs(processor: Any, image: Image.Image, text: str, device: Any = "cpu") -> dict[str, torch.Tensor]:
    """Return the model's inputs for one image and one text.

    Args:
        processor: of the model; its chat template is used where it has one.
        image: RGB.
        text: what to ask; the image token is put in front where it is missing.
        device: where the tensors go.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turn = {"role": "user", "content": content}
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    else:
        token = _image_token(processor)
        if token and token not in text:
            text = f"{token} {text}"
    return dict(processor(images=image, text=text, return_tensors="pt").to(device))


def _image_token(processor: Any) -> str | None:
    for owner in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(owner, "image_token", None)
        if token is not None:
            return str(token)
    return None


def image_positions(config: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return where the image tokens of a one-sample prompt stand: int64 `[number of image tokens]`."""
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if token is None:
        return torch.empty(0, dtype=torch.int64)
    return (inputs["input_ids"][0] == token).nonzero().flatten().cpu()


def patch_grid(config: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """Return rows and columns of the image tokens in the image, or None where they are not one known rectangle."""
    count = image_positions(config, inputs).numel()
    if "image_grid_thw" in inputs and inputs["image_grid_thw"].shape[0] == 1:
        merge = getattr(config.vision_config, "spatial_merge_size", 1)
        _, height, width = (inputs["image_grid_thw"][0]).tolist()
        rows, columns = height // merge, width // merge
    else:
        rows = columns = math.isqrt(count)
    return (rows, columns) if count and rows * columns == count else None


def model_view(processor: Any, inputs: Mapping[str, torch.Tensor], image: Image.Image) -> Image.Image:
    """Return the image as the model sees it, cropped and resized, or the image itself where that cannot be told."""
    pixels = inputs.get("pixel_values")
    settings = getattr(processor, "image_processor", None)
    mean, std = getattr(settings, "image_mean", None), getattr(settings, "image_std", None)
    if pixels is None or pixels.dim() != 4 or tuple(pixels.shape[:2]) != (1, 3) or mean is None or std is None:
        return image
    colours = pixels[0].float().cpu().permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)  # [H, W, 3]
    return Image.fromarray(np.rint(colours.clip(0, 1) * 255).astype(np.uint8))
