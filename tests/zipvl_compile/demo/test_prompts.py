"""Models from disk, and the inputs of one prompt."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from PIL import Image

from zipvl_compile.demo.media import Video
from zipvl_compile.demo.prompts import image_positions, load, prompt_inputs
from zipvl_compile.demo.tiny_lvlm.build import build_config, build_processor, word_ids
from zipvl_compile.demo.tiny_lvlm.canvas import SMALL

PICTURE = Image.new("RGB", (SMALL.size, SMALL.size), (255, 0, 64))


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def x(processor):
    return prompt_inputs(processor, PICTURE, "read all digits :")


def test_a_model_is_loaded_for_inference(folder):
    model, processor = load(str(folder), "cpu")
    assert not model.training and model.device.type == "cpu" and hasattr(processor, "tokenizer")


@pytest.mark.parametrize(("name", "device", "word"), [("./no_such", "cpu", "model"), ("x", "abacus", "device")])
def test_what_cannot_be_loaded_is_named(name, device, word):
    with pytest.raises(ValueError, match=f"^{word}: expected .*got '{name if word == 'model' else device}'"):
        load(name, device)


def test_the_image_token_is_put_in_front_where_it_is_missing(processor, x):
    ids = x["input_ids"]
    assert (ids == word_ids(SMALL)["<image>"]).sum() == SMALL.tokens and x["pixel_values"].shape[0] == 1
    given = prompt_inputs(processor, PICTURE, "<image> read all digits :")
    assert torch.equal(given["input_ids"], ids)


def test_a_chat_template_is_used_where_there_is_one():
    asked = {}

    class Chatting:
        chat_template = "yes"

        def apply_chat_template(self, turns, **given):
            asked["turns"] = turns
            return "templated"

        def __call__(self, images, text, return_tensors):
            asked["text"] = text
            return SimpleNamespace(to=lambda device: {"input_ids": torch.ones(1, 1)})

    prompt_inputs(Chatting(), PICTURE, "what?")
    assert asked["text"] == "templated"
    turns = asked["turns"]
    prompt_inputs(Chatting(), [PICTURE, PICTURE], "what?")
    assert [part["type"] for part in asked["turns"][0]["content"]] == ["image", "image", "text"]
    assert turns == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


def test_image_tokens_are_found(x):
    assert torch.equal(image_positions(build_config(), x), torch.arange(1, 1 + SMALL.tokens)), "behind <bos>"
    assert image_positions(SimpleNamespace(), x).numel() == 0


def test_several_images_each_have_their_tokens(processor, x):
    for text in ("read all digits :", "<image> read all digits :"):
        several = prompt_inputs(processor, [PICTURE, PICTURE], text)
        assert several["pixel_values"].shape[0] == 2
        assert torch.equal(image_positions(build_config(), several), torch.arange(1, 1 + 2 * SMALL.tokens))
    with pytest.raises(ValueError, match="prompt: expected <image> at most 1 times, once a given image, got 2"):
        prompt_inputs(processor, PICTURE, "<image> <image> read all digits :")


def test_videos_go_to_the_processor_as_they_were_chosen(processor):
    asked = {}

    class Watching:
        video_processor, image_token, video_token = "yes", "<image>", "<video>"

        def __call__(self, **given):
            asked.update(given)
            return SimpleNamespace(to=lambda device: {})

    video = Video([PICTURE, PICTURE], [0, 9], 10, 5.0)
    prompt_inputs(Watching(), [], "what?", videos=[video])
    assert asked["text"] == "<video> what?" and "images" not in asked and asked["do_sample_frames"] is False
    assert asked["videos"][0].shape == (2, *PICTURE.size[::-1], 3) and asked["videos"][0][1, 0, 0].tolist() == [
        255,
        0,
        64,
    ]
    assert asked["video_metadata"] == [{"total_num_frames": 10, "fps": 5.0, "frames_indices": [0, 9]}]
    with pytest.raises(ValueError, match="LlavaProcessor has no video processor"):
        prompt_inputs(processor, [], "what?", videos=[video])
