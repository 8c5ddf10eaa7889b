"""Processors of tiny models, built in code: real image processors, and a tokenizer of a few words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from families.family import END, EOS, FIRST_WORD, IMAGE, PAD, START, VIDEO
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WORDS = ("what", "is", "in", "this", "image", "video", "cost", "$5", "?")


def tokenizer(**special: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `WORDS` from `FIRST_WORD` on, with a token `<name>` for every special one."""
    ids = {f"<{name}>": token for name, token in special.items()} | {"<pad>": PAD, "<eos>": EOS, "<unk>": 9}
    ids |= {word: FIRST_WORD + i for i, word in enumerate(WORDS)}
    built = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    built.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={name: f"<{name}>" for name in special},
    )


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer for the tiny models of Qwen-VL's kind."""
    return tokenizer(image_token=IMAGE, video_token=VIDEO, start=START, end=END)


def qwen_images() -> Qwen2VLImageProcessorPil:
    """Return Qwen-VL's image processor for patches of 4 pixels, merged two by two."""
    sizes = {"min_pixels": 64, "max_pixels": 128 * 128}
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, **sizes)


class QwenProcessor:
    """Does what Qwen2.5-VL's processor does: that class needs torchvision. Every second frame stands for two."""

    def __init__(self) -> None:
        self.tokenizer, self.image_processor = qwen_tokenizer(), qwen_images()
        self.video_processor = self.image_processor
        self.image_token, self.video_token = "<image_token>", "<video_token>"
        self.batch_decode = self.tokenizer.batch_decode

    def __call__(
        self, text: str, images: Sequence | Image.Image = (), videos: Sequence[np.ndarray] = (), **given: object
    ) -> BatchFeature:
        images = [images] if isinstance(images, Image.Image) else list(images)
        x: dict[str, torch.Tensor] = {}
        for token, pictures, pixels, grid in (
            (self.image_token, [[one] for one in images], "pixel_values", "image_grid_thw"),
            (self.video_token, [list(video[::2]) for video in videos], "pixel_values_videos", "video_grid_thw"),
        ):
            if not pictures:
                continue
            cut = [self.image_processor(images=frames, return_tensors="pt") for frames in pictures]
            x[pixels] = torch.cat([one["pixel_values"] for one in cut])
            x[grid] = torch.tensor(
                [[len(one["image_grid_thw"]), *one["image_grid_thw"][0, 1:].tolist()] for one in cut]
            )
            for patches in x[grid].prod(1).tolist():
                text = text.replace(token, "<start>" + "<placeholder>" * (patches // 4) + "<end>", 1)
            text = text.replace("<placeholder>", token)
        x |= dict(self.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        x["mm_token_type_ids"] = (x["input_ids"] == IMAGE).long() + 2 * (x["input_ids"] == VIDEO).long()
        return BatchFeature(x)
