"""Bars and strips: their heights and cells are the shares that the layers keep."""

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")

from matplotlib.figure import Figure

from zipvl_compile.demo.layout import Layout
from zipvl_compile.demo.plot_charts import TEXT, Bars, Strip
from zipvl_compile.demo.plot_parts import WIDTH

NOTHING = torch.empty(0, dtype=torch.int64)


def drawn(part):
    figure = Figure(figsize=(WIDTH, part.height))
    part.draw(figure, 0.0)
    (axes,) = figure.axes
    return axes


def test_bars_are_the_kept_shares():
    layout = Layout(10, [], torch.arange(2, 10), NOTHING, torch.arange(2), ["a", "b"])
    layers = [torch.tensor([0, 2, 3]), None, torch.tensor([[0, 1, 5], [0, 6, 7]])]
    axes = drawn(Bars(layout, layers, ["full attention", "sliding window", "full attention"]))
    heights = [[bar.get_height() for bar in one] for one in axes.containers]
    expected = [[30, 30], [25, (12.5 + 25) / 2], [50, 75]]  # of all, of the image, of the text
    assert [pytest.approx(one) for one in heights] == expected
    middles = [round(bar.get_x() + bar.get_width() / 2) for bar in axes.containers[0]]
    assert middles == [0, 2], "a layer of another kind has no bar"
    assert "sliding window" in [text.get_text() for text in axes.texts]
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert said == ["all prompt tokens (10)", "image and video tokens (8)", "text tokens (2)"]
    assert axes.get_ylabel() == "kept (% of tokens)" and axes.get_xlabel() == "decoder layer"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]


def test_bars_of_many_layers_and_of_text_alone():
    layout = Layout(4, [], NOTHING, NOTHING, torch.arange(4), list("abcd"))
    axes = drawn(Bars(layout, [torch.arange(1 + n % 4) for n in range(60)], []))
    assert len(axes.containers) == 2, "no bars of images where there are none"
    assert len(axes.containers[0]) == 60 and not axes.texts, "no numbers where they would overlap"
    assert len(axes.get_xticks()) == 30


def test_a_strip_shows_which_tokens_each_layer_keeps():
    layers = {0: torch.tensor([0, 8]), 5: torch.tensor([7, 8, 9])}
    axes = drawn(
        Strip("text", torch.tensor([0, 7, 8, 9]), ["<bos>", "a$b$", "a word of many letters", "?"], layers, TEXT)
    )
    assert axes.images[0].get_array().tolist() == [[1, 0, 1, 0], [0, 1, 1, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0: 2 of 4 (50%)", "layer 5: 3 of 4 (75%)"]
    words = axes.get_xticklabels()
    assert [label.get_text() for label in words] == ["<bos>", "a$b$", "a word of man\u2026", "?"]
    assert not any(label.get_parse_math() for label in words)
    kept, dropped = axes.images[0].cmap(1.0), axes.images[0].cmap(0.0)
    assert kept[:3] == pytest.approx([0, 0x72 / 255, 0xB2 / 255]) and min(dropped) > 0.85


def test_many_tokens_and_layers_are_drawn_without_words():
    many = torch.arange(300)
    strip = Strip("text", many, [str(i) for i in range(300)], dict.fromkeys(range(80), many), TEXT)
    axes = drawn(strip)
    assert axes.images[0].get_array().shape == (80, 300) and "300 tokens" in axes.get_xlabel()
    assert len(axes.get_yticklabels()) <= 24 and strip.height < 5
