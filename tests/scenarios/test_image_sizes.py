"""Images of many sizes and numbers, one model: right each time, and what is compiled anew is known."""

from __future__ import annotations

import pytest
import torch
from support import tiny_llava, tiny_models
from support.image_sizes import llava_prompt, qwen_prompt

SIZES = [(8, 8), (8, 12), (12, 12), (16, 8), (16, 16), (12, 20), (20, 20), (24, 16), (28, 12), (8, 28)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compiles_of(f, eager, x) -> int:
    """Return how many graphs a prompt compiles; its greedy tokens must be those of the eager model."""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    got = f.generate(**x, max_new_tokens=4, do_sample=False)
    compiled = stats["unique_graphs"] - before
    assert torch.equal(got, eager.generate(**x, max_new_tokens=4, do_sample=False))
    return compiled


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_ten_image_sizes_compile_nothing_after_the_second(family):
    f, eager = tiny_models.compiled(family, tau=1.0), tiny_models.model(family)
    compiles = [compiles_of(f, eager, qwen_prompt(*size)) for size in SIZES]
    assert compiles[0] > 0 and compiles[2:] == [0] * 8


def test_every_number_of_images_compiles_the_prompt_once_and_is_known_from_then_on():
    f, eager = tiny_llava.compiled(tau=1.0), tiny_llava.model()
    compiles = [compiles_of(f, eager, llava_prompt(images)) for images in (1, 2, 3, 4, 5)]
    assert compiles[2:] == [3] * 3  # the features of each image are one entry of a list, whose length Dynamo guards
    assert [compiles_of(f, eager, llava_prompt(images)) for images in (2, 5, 3)] == [0] * 3


def test_numbers_of_images_past_the_recompile_limit_are_right():
    f, eager = tiny_llava.compiled(tau=1.0), tiny_llava.model()
    with torch._dynamo.config.patch(recompile_limit=4):
        compiles = [compiles_of(f, eager, llava_prompt(images)) for images in (1, 2, 3, 4, 5)]
        assert compiles[-1] == 0
        assert compiles_of(f, eager, llava_prompt(1)) == 0
