"""The figure: a row of panels for each quality of a model, families joined by lines, values written beside points."""

import pytest

pytest.importorskip("matplotlib", reason="an extra: pip install 'zipvl-compile[cli]'")

from matplotlib.figure import Figure
from PIL import Image

from zipvl_compile.evaluate.figure import draw

COSTS = {"kv_bytes_of_dense": 0.4, "prefill_flops_of_dense": 0.8}
ROWS = {
    ("text", "dense"): {"nll_minus_dense": 0.0, "kv_bytes_of_dense": 1.0, "prefill_flops_of_dense": 1.0},
    ("text", "tau 0.9"): {"nll_minus_dense": 0.3, "nll_minus_dense_se": 0.1, **COSTS},
    ("text", "tau 0.8"): {"nll_minus_dense": 0.5, **COSTS, "kv_bytes_of_dense": 0.2},
    ("pictures", "dense"): {"accuracy_minus_dense": 0.0, **COSTS},
    ("pictures", "keep_ratio 0.4"): {"accuracy_minus_dense": -0.05, **COSTS},
}


def test_panels_points_and_labels(tmp_path, monkeypatch):
    figures = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), saved(self, *args, **how)))
    draw(tmp_path / "f.png", ROWS)
    width, height = Image.open(tmp_path / "f.png").size
    assert width > 1000 and height > 500
    axes = figures[0].axes
    assert [axis.get_xlabel()[:8] for axis in axes] == ["KV cache", "FLOPs of"] * 2
    assert [axes[0].get_title(loc="left"), axes[2].get_title(loc="left")] == ["text", "pictures"]
    assert [text.get_text() for text in axes[0].texts] == ["0.8", "0.9"]
    line = next(line for line in axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() != "None")
    # Per cent of dense, and the quality: the likelihood gained.
    assert list(line.get_xdata()) == [20, 40] and list(line.get_ydata()) == [-0.5, -0.3]
    assert [text.get_text() for text in axes[2].texts] == ["0.4"]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["dense", "tau", "keep_ratio"]
