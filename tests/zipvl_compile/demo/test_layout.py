"""Where text, images and frames stand in a prompt: every token's cell is the part of the picture it is made of."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")

from families.family import IMAGE, VIDEO
from families.qwen_like import FAMILIES
from PIL import Image
from support.tiny_processors import QwenProcessor, qwen_images, qwen_tokenizer

from zipvl_compile.demo.layout import layout_of
from zipvl_compile.demo.media import Video
from zipvl_compile.demo.prompts import prompt_inputs

COLOURS = SimpleNamespace(vision_config=SimpleNamespace(patch_size=8), image_token_id=IMAGE, video_token_id=VIDEO)


@pytest.fixture(scope="module")
def config():
    return FAMILIES["qwen2_5_vl"].build().config


def cells(rows, columns, first=0):
    """A picture of 8 x 8 pixels a token, the cell of row r and column c in a colour of its own."""
    number = first + np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    grey = np.stack([number * 2, 255 - number, number], -1)
    return Image.fromarray(grey.repeat(8, 0).repeat(8, 1))


def seen(processor, pixels):
    """The mean colour of every token's patches `[4 * tokens, 3 * 2 * 4 * 4]`, in 0 to 255."""
    colours = pixels.view(-1, 4, 3, 32).mean((1, 3))
    mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    return 255 * (colours * std + mean)


def shown(panel):
    """The mean colour of the picture behind every token of a panel, `[rows, columns, 3]`."""
    rows, columns = panel.positions.shape
    picture = np.asarray(panel.picture, dtype=np.float32)
    return torch.from_numpy(picture.reshape(rows, 8, columns, 8, 3).mean((1, 3)))


def test_two_images_of_different_sizes(config):
    processor, images = QwenProcessor(), [cells(4, 6), cells(5, 3, 100)]
    x = prompt_inputs(processor, images, "what is in this image ?")
    layout = layout_of(config, processor, x, images)
    assert [(panel.name, *panel.positions.shape) for panel in layout.panels] == [("image 1", 4, 6), ("image 2", 5, 3)]
    patches = seen(processor, x["pixel_values"])
    tokens = (x["input_ids"][0] == IMAGE).nonzero().flatten()
    for panel in layout.panels:
        order = torch.searchsorted(tokens, panel.positions)
        assert (patches[order] - shown(panel)).abs().max() < 1.5, "a token lies where its pixels come from"
    assert layout.visual.tolist() == tokens.tolist() and not layout.unplaced.numel()
    assert layout.words == ["<start>", "<end>", "<start>", "<end>", "what", "is", "in", "this", "image", "?"]
    assert layout.length == x["input_ids"].shape[1] == len(layout.words) + len(tokens)
    assert x["input_ids"][0, layout.text[-1]] == x["input_ids"][0, -1]


def test_frames_of_a_video(config):
    """Two frames make one step; of five, the last stands alone."""
    processor, frames = QwenProcessor(), [cells(3, 5, 20 * i) for i in range(5)]
    x = prompt_inputs(processor, [cells(4, 2)], "what ?", videos=[Video(frames, list(range(5)), 5)])
    layout = layout_of(config, processor, x, [cells(4, 2)], [frames])
    names = ["image", "video, frames 1-2", "video, frames 3-4", "video, frame 5"]
    assert [panel.name for panel in layout.panels] == names
    assert all(panel.positions.shape == (3, 5) for panel in layout.panels[1:])
    patches = seen(processor, x["pixel_values_videos"])
    tokens = (x["input_ids"][0] == VIDEO).nonzero().flatten()
    for panel in layout.panels[1:]:
        assert (patches[torch.searchsorted(tokens, panel.positions)] - shown(panel)).abs().max() < 1.5
    unseen = layout_of(config, processor, x).panels
    assert [panel.picture for panel in unseen] == [None] * 4 and unseen[1].name == "video, step 1"


def test_the_processor_of_qwen(config):
    pytest.importorskip("torchvision", reason="an extra: pip install 'zipvl-compile[demo]'")
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    sizes = {"min_pixels": 64, "max_pixels": 128 * 128}
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, **sizes)
    built = qwen_tokenizer()
    real = Qwen2_5_VLProcessor(image_processor=qwen_images(), tokenizer=built, video_processor=videos)
    frames, images = [cells(3, 5, 20 * i) for i in range(5)], [cells(4, 6), cells(5, 3, 100)]
    video = Video(frames, list(range(0, 10, 2)), 10, 24.0)
    x = prompt_inputs(real, images, "what ?", videos=[video])
    layout = layout_of(config, real, x, images, [frames])
    grids = [tuple(panel.positions.shape) for panel in layout.panels]
    assert grids == [(4, 6), (5, 3), (3, 5), (3, 5), (3, 5)]
    assert layout.panels[4].name == "video, frame 5" and layout.panels[4].picture is frames[4]
    patches = seen(real, x["pixel_values_videos"])
    tokens = (x["input_ids"][0] == VIDEO).nonzero().flatten()
    last = layout.panels[4]
    assert (patches[torch.searchsorted(tokens, last.positions)] - shown(last)).abs().max() < 1.5


def test_tokens_in_another_number_have_no_place(config):
    processor, images = QwenProcessor(), [cells(4, 6)]
    x = prompt_inputs(processor, images, "what ?")
    odd = {**x, "image_grid_thw": torch.tensor([[1, 8, 14]])}
    layout = layout_of(config, processor, odd, images)
    assert not layout.panels and torch.equal(layout.unplaced, layout.visual) and layout.unplaced.numel() == 24


def test_frames_of_onevision():
    """Pooled two by two, and one token behind the last frame."""
    frames = torch.rand(1, 3, 3, 56, 56)
    ids = torch.tensor([[1, *[VIDEO] * (3 * 16 + 1), 2]])
    layout = layout_of(COLOURS, SimpleNamespace(), {"input_ids": ids, "pixel_values_videos": frames})
    assert [panel.name for panel in layout.panels] == [f"video, frame {i}" for i in (1, 2, 3)]
    assert torch.equal(layout.panels[1].positions, 17 + torch.arange(16).view(4, 4))
    assert layout.words == ["1", "2"], "no tokenizer"


def test_frames_that_are_images_to_the_model():
    """InternVL and SmolVLM: an image of one tile, then a run of image tokens for every frame."""
    pixels = torch.rand(4, 3, 32, 32)
    ids = torch.tensor([[1, *[IMAGE] * 16, 2, *([IMAGE] * 16 + [3]) * 3]])
    frames = [cells(2, 2)] * 3
    layout = layout_of(COLOURS, SimpleNamespace(), {"input_ids": ids, "pixel_values": pixels}, [cells(2, 2)], [frames])
    assert [panel.name for panel in layout.panels] == ["image", *(f"video, frame {i}" for i in (1, 2, 3))]
    assert layout.panels[2].positions[0, 0] == 18 + 17


def test_one_prompt_alone():
    with pytest.raises(ValueError, match=r"expected one prompt, input_ids of \[1, n\], got \[2, 3\]"):
        layout_of(COLOURS, None, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})


def test_blanks_are_seen():
    tokenizer = SimpleNamespace(decode=lambda ids: {1: "\n", 2: " ", 3: " word"}[ids[0]])
    layout = layout_of(
        SimpleNamespace(), SimpleNamespace(tokenizer=tokenizer), {"input_ids": torch.tensor([[1, 2, 3]])}
    )
    assert layout.words == ["\\n", "\u2423", "word"] and not dataclasses.asdict(layout)["panels"]
