"""Whether a score favours early tokens: how many image tokens each quarter of a picture keeps.

    make bench        appends to benchmarks/results/position_bias.jsonl

The patches of every picture are permuted, so that no place holds more than another: without a bias every quarter of the
rows, from top to bottom, keeps the same share. The bundled LVLM, prompts by generate, the first layer and all layers.
"""

from __future__ import annotations

import pytest
import torch
from harness import report

import zipvl_compile
from zipvl_compile.demo.prompts import image_positions, load, prompt_inputs
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.evaluate import questions_for_demo

PICTURES, QUARTERS = 40, 4
SCORES = ("normalised", "even", "accumulated")


@pytest.fixture(scope="module")
def prompts():
    """Return the model, and prompts about pictures whose patches stand in an order of their own."""
    model, processor = load(str(CHECKPOINT), "cpu")
    size, found = model.config.vision_config.patch_size, []
    for i, question in enumerate(questions_for_demo(PICTURES, seed=3)):
        inputs = prompt_inputs(processor, question.image, question.prompt)
        pixels = inputs["pixel_values"]
        patches = pixels.unfold(2, size, size).unfold(3, size, size).flatten(2, 3)  # [1, C, patches, size, size]
        order = torch.randperm(patches.shape[2], generator=torch.Generator().manual_seed(i))
        rows = pixels.shape[2] // size
        moved = patches[:, :, order].unflatten(2, (rows, -1)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        assert moved.shape == pixels.shape and torch.equal(moved.sum().round(), pixels.sum().round())
        found.append(inputs | {"pixel_values": moved})
    return model, found


@pytest.mark.benchmark(group="position bias")
@pytest.mark.parametrize("score", SCORES)
def test_position_bias(benchmark, prompts, score):
    torch._dynamo.reset()
    model, every = prompts
    options = {"policy": "paper", "tau": 0.9, "score": score, "min_tokens": 0, "inner": "eager"}
    kept = torch.zeros(model.config.text_config.num_hidden_layers, QUARTERS)
    compiled = torch.compile(model, backend="zipvl", options=options, dynamic=True)

    def prefill(inputs):
        with torch.no_grad():
            return compiled(**inputs, use_cache=True, logits_to_keep=1)

    for inputs in every:
        image = image_positions(model.config, inputs)
        for layer, positions in enumerate(zipvl_compile.kept_tokens(prefill(inputs))):
            for quarter, of_quarter in enumerate(image.chunk(QUARTERS)):
                kept[layer, quarter] += torch.isin(of_quarter, positions[0, 0]).float().mean() / PICTURES
    benchmark.pedantic(prefill, args=(every[0],), rounds=1)
    for name, share in (("first layer", kept[0]), ("all layers", kept.mean(0))):
        metrics = {f"quarter_{i + 1}": (part, "fraction kept") for i, part in enumerate(share.tolist())}
        last_over_first = (share[-1] / share[0]).item()
        report("position_bias", "position bias", f"{PICTURES} pictures of permuted patches, tau 0.9, {name}", score,
               **metrics, last_over_first=(last_over_first, "ratio"))  # fmt: skip
