"""Models and images from disk, the inputs of one prompt, and the image in them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from PIL import Image

from zipvl_compile.demo.prompts import image_positions, load, model_view, patch_grid, prompt_inputs, read_image
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


def test_images_are_read_as_rgb(picture, tmp_path):
    assert read_image(picture).mode == "RGB"
    (tmp_path / "text.png").write_text("no image")
    for bad in (tmp_path / "text.png", tmp_path / "none.png"):
        with pytest.raises(ValueError, match=f"image: expected an image file, got .*{bad.name}"):
            read_image(bad)


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
    assert asked["turns"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


def test_image_tokens_and_their_grid_are_found(x):
    config = build_config()
    where = image_positions(config, x)
    assert torch.equal(where, torch.arange(1, 1 + SMALL.tokens)), "behind <bos>"
    assert patch_grid(config, x) == (SMALL.grid, SMALL.grid)
    assert image_positions(SimpleNamespace(), x).numel() == 0 and patch_grid(SimpleNamespace(), x) is None


@pytest.mark.parametrize(
    ("tokens", "more", "grid"),
    [
        (6, {"image_grid_thw": torch.tensor([[1, 4, 6]])}, (2, 3)),  # merged two by two
        (6, {}, None),  # no square
        (9, {}, (3, 3)),
        (6, {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]])}, None),  # two images
    ],
)
def test_grids(tokens, more, grid):
    config = SimpleNamespace(image_token_id=7, vision_config=SimpleNamespace(spatial_merge_size=2))
    assert patch_grid(config, {"input_ids": torch.tensor([[1] + [7] * tokens]), **more}) == grid


def test_the_view_of_the_model_is_the_picture_again(processor, x):
    view = model_view(processor, x, Image.new("RGB", (3, 3)))
    assert view.size == PICTURE.size and view.getpixel((5, 5)) == (255, 0, 64)


def test_a_view_that_cannot_be_told_is_the_picture(processor):
    assert model_view(processor, {"pixel_values": torch.ones(4, 6)}, PICTURE) is PICTURE
    assert model_view(SimpleNamespace(), {}, PICTURE) is PICTURE


def test_a_picture_over_the_limit_of_pil_is_a_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (40, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ValueError, match=r"image: expected at most 1400 pixels, got more in .*large\.png"):
        read_image(path)
