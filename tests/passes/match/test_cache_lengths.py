"""Layers of one prompt that hold unlike numbers of tokens are found; those of other prompts are let alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.match.cache_lengths import uneven_layers
from zipvl_compile.passes.match.sites import match

KEPT = 4


def uneven(*layers: tuple[int, int]) -> list[int]:
    """Return the lengths that differ in a graph that attends over layers of a prompt length and a length."""
    found = []

    def backend(gm, example_inputs):
        found.append(uneven_layers(match(gm.graph)))
        return lambda *inputs: (inputs[0],)

    def attend(q, keys, values, positions, prompts, lengths):
        for prompt, n in zip(prompts, lengths, strict=True):
            views = (ops.kv_view(x, positions, prompt, n) for x in (keys, values))
            q = q + F.scaled_dot_product_attention(q, *views)
        return q

    q, buffer = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 40, 8)
    torch._dynamo.reset()
    torch.compile(attend, backend=backend)(
        q, buffer, buffer, torch.arange(KEPT)[None, None], *zip(*layers, strict=True)
    )
    return [n for _, n in found[0]]


@pytest.mark.parametrize(
    "layers, lengths",
    [
        ([(10, 12)], []),
        ([(10, 12), (10, 12), (10, 12)], []),
        ([(10, 12), (10, 12), (10, 13)], [12, 13]),
        ([(10, 13), (10, 12), (10, 12)], [13, 12]),
        ([(10, 12), (20, 25)], []),
        ([(10, 12), (20, 25), (20, 24)], [25, 24]),
    ],
)
def test_layers_of_one_prompt_are_compared(layers, lengths):
    assert uneven(*layers) == lengths
