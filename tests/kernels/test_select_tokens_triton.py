"""The kernels of select_tokens, whatever part of the scores a program holds at a time."""

import pytest
import torch
from support.implementations import triton_only
from support.scores import RULES, drawn, same

from zipvl_compile.kernels import select_tokens_triton as module
from zipvl_compile.kernels.select_tokens_torch import best_tokens


@pytest.mark.parametrize("tile", [64, 16384], ids=["many-tiles", "one-tile"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 63, 500, 1025])
@triton_only
def test_every_size(implementation, monkeypatch, n, rule, tile):
    monkeypatch.setattr(module, "MAX_BLOCK", tile)
    same(implementation, *drawn(n), **rule)


@pytest.mark.parametrize("normalise", [False, True])
@triton_only
def test_ranking_with_and_without_normalising(implementation, normalise):
    accumulated, visible = drawn(200, batch=3)
    inputs = accumulated.float(), visible.float()
    found = implementation.compute(module.best_tokens_triton, *inputs, 40, 3, normalise)
    assert torch.equal(found.cpu(), best_tokens(*inputs, 40, 3, normalise))
