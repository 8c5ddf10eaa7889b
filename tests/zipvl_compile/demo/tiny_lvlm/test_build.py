"""The untrained parts: model, tokenizer, processor."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.batches import pixel_values
from zipvl_compile.demo.tiny_lvlm.build import (
    build_config,
    build_model,
    build_processor,
    build_tokenizer,
    normalise,
    word_ids,
)
from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES, LARGE, SMALL
from zipvl_compile.demo.tiny_lvlm.questions import BOS, UNKNOWN, vocabulary
from zipvl_compile.demo.tiny_lvlm.scenes import draw_scene


@pytest.mark.parametrize("source", ["saved", "built"])
def test_processor_pixels_are_those_of_training(request, source):
    rng = np.random.default_rng(4)
    scenes = [draw_scene(rng, "held_out") for _ in range(3)]
    images = [Image.fromarray(scene.image) for scene in scenes]
    chosen = request.getfixturevalue("processor") if source == "saved" else build_processor()
    pixels = chosen(images=images, text=["<image> read all digits :"] * 3, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, pixel_values(scenes), atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (build_model(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_first_query_head_of_a_group_starts_as_its_key_head():
    config = build_config().text_config
    attention = build_model(0).model.language_model.layers[0].self_attn
    keys = attention.k_proj.weight.unflatten(0, (config.num_key_value_heads, -1))
    queries = attention.q_proj.weight.unflatten(0, (config.num_key_value_heads, -1, attention.head_dim))
    assert torch.equal(queries[:, 0], keys) and not torch.equal(queries[:, 1], keys)


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
def test_every_word_is_one_token(canvas):
    tokenizer, words = build_tokenizer(canvas), word_ids(canvas)
    ids = tokenizer(" ".join(vocabulary(canvas)), add_special_tokens=False)["input_ids"]
    assert ids == list(words.values()) == list(range(len(words)))
    assert tokenizer("read xyzzy")["input_ids"] == [words[word] for word in (BOS, "read", UNKNOWN)]


def test_a_large_canvas_has_as_many_tokens_as_cells():
    config, processor = build_config(LARGE), build_processor(LARGE)
    picture = Image.fromarray(draw_scene(np.random.default_rng(0), canvas=LARGE).image)
    inputs = processor(images=[picture], text=["<image> read all digits :"], return_tensors="pt")
    assert (inputs["input_ids"] == config.image_token_index).sum() == config.image_seq_length == LARGE.tokens == 9216
    assert inputs["pixel_values"].shape[-2:] == (LARGE.size, LARGE.size)
    parameters = sum(weight.numel() for weight in build_model(0, LARGE).parameters())
    assert parameters * 4 < 10e6 and build_config(SMALL).image_seq_length == 256


def test_pixels_are_centred():
    images = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    assert torch.allclose(normalise(images), torch.full((1, 3, 4, 4), (1 - 0.3) / 0.25))
