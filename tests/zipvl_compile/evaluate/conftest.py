"""Compiled copies raise the recompile limit of their process, which is not that of other tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def limit_of_pytorch():
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.fixture(autouse=True)
def fewer_graphs(monkeypatch):
    # The input checks of transformers break the graph; the time that takes is better spent elsewhere.
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
