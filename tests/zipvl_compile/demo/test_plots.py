"""The picture of kept tokens: what it shows is what the KV cache holds."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from families.qwen_like import FAMILIES
from matplotlib.patches import PathPatch
from PIL import Image
from support.tiny_processors import QwenProcessor

import zipvl_compile
from zipvl_compile import kept_tokens
from zipvl_compile.demo import plots
from zipvl_compile.demo.compare import compiled_copy
from zipvl_compile.demo.layout import Layout, layout_of
from zipvl_compile.demo.media import Video
from zipvl_compile.demo.panel import Panel
from zipvl_compile.demo.plots import Kept, draw_kept, kept_figure, save
from zipvl_compile.demo.prompts import load, prompt_inputs
from zipvl_compile.report.stats import CacheStats, LayerStats

NOTHING = torch.empty(0, dtype=torch.int64)


def noise(width, height):
    return Image.effect_noise((width, height), 90).convert("RGB")


def kept_in(axes, rows, columns):
    """Which tokens of a panel are not hatched, bool `[rows, columns]`."""
    found = torch.ones(rows, columns, dtype=torch.bool)
    for patch in axes.patches:
        if isinstance(patch, PathPatch):
            for polygon in patch.get_path().to_polygons():
                found[int(polygon[:, 1].min()), int(polygon[:, 0].min())] = False
    return found


def axes_of(figure, part):
    return [axes for axes in figure.axes if part in axes.get_label()]


def agrees(figure, cache, inputs, token, grids):
    """The panels of every layer, and the bars, show what the cache holds; tokens lie row by row, image by image."""
    n, ids = inputs["input_ids"].shape[1], inputs["input_ids"][0]
    held = [positions[0, 0][positions[0, 0] < n] for positions in kept_tokens(cache)]
    places = (ids == token).nonzero().flatten().split([rows * columns for rows, columns in grids])
    for layer, positions in enumerate(held):
        views = axes_of(figure, f"layer {layer}:")
        assert len(views) == len(grids)
        for axes, own, grid in zip(views, places, grids, strict=True):
            expected = torch.isin(own, positions).view(grid)
            assert torch.equal(kept_in(axes, *grid), expected)
            assert f"{int(expected.sum())} of {own.numel()} kept" in axes.get_title(loc="left")
    (bars,) = axes_of(figure, "kept share")
    assert [bar.get_height() for bar in bars.containers[0]] == pytest.approx([100 * len(p) / n for p in held])
    (strip,) = axes_of(figure, "text tokens")
    text = (ids != token).nonzero().flatten()
    expected = torch.stack([torch.isin(text, positions) for positions in held])
    assert strip.images[0].get_array().tolist() == expected.float().tolist()
    assert expected.float().mean() > 0 and any(len(p) < n for p in held), "something was dropped"


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    model = FAMILIES["qwen2_5_vl"].build().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # wider than the initial weights, so that attention is not uniform
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.pad_token_id = 0
    return compiled_copy(model, {"min_tokens": 0, "keep_ratio": 0.4}, "eager", dynamic=True)


def test_two_images_of_different_sizes(qwen, tmp_path):
    processor, images = QwenProcessor(), [noise(96, 64), noise(48, 120)]
    x = prompt_inputs(processor, images, "what is in this image ?")
    out = qwen.generate(**x, max_new_tokens=2, return_dict_in_generate=True)
    figure = draw_kept(tmp_path / "new" / "x.png", qwen, processor, x, out, images, lines=["question: what?"])
    assert Image.open(tmp_path / "new" / "x.png").size[0] == 1200
    agrees(figure, out, x, 5, [(8, 12), (15, 6)])
    title, question = (text.get_text() for text in figure.texts[:2])
    assert title.startswith("zipvl keeps 40% of this prompt's 196 tokens (mean of 2 layers): ")
    assert " kB of KV cache instead of " in title and question.startswith("question: what?")


def test_a_video(qwen, tmp_path):
    processor, frames = QwenProcessor(), [noise(48, 32) for _ in range(20)]
    x = prompt_inputs(processor, [], "what ?", videos=[Video(frames[:6], list(range(6)), 6)])
    out = qwen.generate(**x, max_new_tokens=2, return_dict_in_generate=True)
    figure = draw_kept(tmp_path / "x.svg", qwen, processor, x, out, videos=[frames[:6]])
    agrees(figure, out, x, 6, [(4, 6)] * 3)
    assert axes_of(figure, "layer 1:")[2].get_title(loc="left").startswith("video, frames 5-6\n")


def test_two_images_of_a_llava(folder, tmp_path):
    model, processor = load(str(folder), "cpu")
    model = compiled_copy(model, {"min_tokens": 0, "keep_ratio": 0.3}, "eager")
    images = [noise(48, 48), noise(60, 30)]
    x = prompt_inputs(processor, images, "read all digits :")
    out = model.generate(**x, max_new_tokens=1, return_dict_in_generate=True)
    figure = draw_kept(tmp_path / "x.png", model, processor, x, out, images)
    agrees(figure, out, x, model.config.image_token_id, [(16, 16)] * 2)
    unnamed = [panel.name for panel in layout_of(model.config, processor, x).panels]
    assert unnamed == ["tile 1 of 2", "tile 2 of 2"], "without the images, they may be tiles of one"
    assert axes_of(figure, "what the model sees | image 1")[0].images[0].get_array().std() > 0.1


def test_heads_that_keep_their_own_and_where_the_other_tokens_are(tmp_path, monkeypatch):
    layers = (LayerStats(4, 2, 3, 5, 10, 10, 6, bits=4, bytes_on_host=2_000),)
    monkeypatch.setattr(plots, "stats", lambda cache: CacheStats(layers))
    # Two heads; position 4 is of a token behind the prompt.
    monkeypatch.setattr(plots, "kept_tokens", lambda cache: [torch.tensor([[[0, 1, 4], [1, 3, 4]]])])
    model = SimpleNamespace(config=SimpleNamespace())
    figure = draw_kept(tmp_path / "x.png", model, None, {"input_ids": torch.tensor([[7, 8, 9, 7]])}, None)
    title, below = (text.get_text() for text in figure.texts[:2])
    assert title.startswith("zipvl keeps 50% of this prompt's 4 tokens (mean of one layer): ") and "(62%)" in title
    assert all(part in below for part in ("Every KV head", "held at 4 bits", "in host memory: 2.0 kB"))
    assert axes_of(figure, "text tokens")[0].images[0].get_array().tolist() == [[0.5, 1, 0, 0.5]]


def layout_with(panels, text=4):
    tokens = sum(panel.positions.numel() for panel in panels)
    return Layout(
        tokens + text, panels, torch.arange(tokens), NOTHING, torch.arange(tokens, tokens + text), ["a"] * text
    )


def frames(count):
    return [Panel(f"video, frame {i + 1}", None, torch.arange(6 * i, 6 * i + 6).view(2, 3)) for i in range(count)]


def test_at_most_eight_panels_and_layers_are_drawn_and_that_is_said():
    layout = layout_with(frames(20))
    figure = kept_figure(layout, Kept([torch.tensor([0, 5])] * 10 + [None], [], 10, 20))
    shown = axes_of(figure, "what the model sees")
    assert [axes.get_label().split()[-1] for axes in shown] == ["1", "4", "6", "9", "12", "15", "17", "20"]
    layers = {axes.get_label().split(":")[0] for axes in axes_of(figure, "layer ") if "|" in axes.get_label()}
    assert layers == {f"layer {n}" for n in (0, 1, 3, 4, 5, 6, 8, 9)}
    assert len(axes_of(figure, "kept share")[0].containers[0]) == 10, "the bars show all"
    said = figure.texts[1].get_text()
    assert said.startswith("8 of 20 panels of video frames shown, evenly chosen; 8 of 10 layers shown")


def test_image_tokens_whose_place_is_not_known_have_a_strip():
    layout = Layout(9, [], torch.arange(6), torch.arange(6), torch.arange(6, 9), ["a", "b", "c"])
    figure = kept_figure(layout, Kept([torch.tensor([1, 5, 7])], [], 1, 3))
    (strip,) = axes_of(figure, "is not known")
    assert strip.images[0].get_array().tolist() == [[0, 1, 0, 0, 0, 1]]
    assert not axes_of(figure, "what the model sees") and not figure.legends


def test_a_prompt_that_stays_dense_is_said_to():
    layout = layout_with(frames(1))
    figure = kept_figure(layout, Kept([torch.arange(10)] * 2, [], 2_500_000, 2_500_000))
    assert figure.texts[0].get_text() == "Every layer keeps all 10 tokens of this prompt: 2.5 MB of KV cache"
    with pytest.raises(ValueError, match="expected layers of which zipvl keeps a part, got none"):
        kept_figure(layout, Kept([None, None], [], 1, 1))


@pytest.mark.parametrize("text", ["costs $5 or $6?", r"a \frac and $x_1^2$", "$$", "\u6f22\u5b57"])
def test_what_a_model_writes_is_drawn_as_it_is(tmp_path, text, recwarn):
    layout = layout_with(frames(1), text=1)
    layout.words[:] = [text]
    save(kept_figure(layout, Kept([torch.tensor([1])], [], 1, 2), [text]), tmp_path / "x.png")
    assert not recwarn.list and (tmp_path / "x.png").exists()


def test_the_package_needs_no_matplotlib():
    package = Path(zipvl_compile.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    drawing = r"^(from|import) (matplotlib|zipvl_compile\.demo\.(plot|side_by_side|explained|bundled))"
    found = {name.split("/")[0] for name, text in sources.items() if re.search(drawing, text, re.MULTILINE)}
    assert "demo" in found and found <= {"demo", "evaluate"}, "what draws is imported by what draws alone"
    above = [
        name
        for name, text in sources.items()
        if re.search(r"^(from|import) zipvl_compile\.(demo|evaluate)", text, re.M)
    ]
    assert {name.split("/")[0] for name in above} <= {"demo", "evaluate"}
