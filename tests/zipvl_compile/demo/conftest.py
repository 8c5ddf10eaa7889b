"""A tiny untrained LLaVA on disk, and a picture."""

import pytest
import torch

LAYERS = 2

# What needs the extra `demo` is imported in the fixtures: the tests that use them are skipped without it.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA as the bundled one, with fewer layers and random weights, and its processor."""
    from transformers import LlavaForConditionalGeneration

    from zipvl_compile.demo.tiny_lvlm.build import build_config, build_model, build_processor

    folder = tmp_path_factory.mktemp("model")
    config = build_config()
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = LAYERS, 1
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = build_model(0).generation_config
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fewer_graphs(monkeypatch):
    # The input checks of transformers break the graph; the time that takes is better spent elsewhere.
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "in.png"
    Image.effect_noise((48, 48), 60).save(path)
    return path


@pytest.fixture(autouse=True)
def limit_of_pytorch():
    """The demo raises the recompile limit of its process, which is not that of other tests."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
