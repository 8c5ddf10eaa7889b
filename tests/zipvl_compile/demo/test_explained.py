"""The picture beside an explanation: drawn of the prompt, with what was rewritten."""

import pytest
from PIL import Image

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from zipvl_compile import explain
from zipvl_compile.demo import explained, plots
from zipvl_compile.demo.prompts import load, prompt_inputs


@pytest.mark.parametrize(
    "options", [{"min_tokens": 0, "keep_ratio": 0.3}, {"min_tokens": 5000}], ids=["sparse", "dense"]
)
def test_what_is_drawn_is_what_is_explained(folder, tmp_path, monkeypatch, options):
    figures = []
    monkeypatch.setattr(explained, "draw_kept", lambda *given: figures.append(plots.draw_kept(*given)))
    model, processor = load(str(folder), "cpu")
    images = [Image.effect_noise((48, 48), 60).convert("RGB")] * 2
    x = prompt_inputs(processor, images, "read all digits :")
    explanation = explain(model, options=options, **x)
    explained.draw_explained(tmp_path / "x.png", explanation, model, processor, x, "read all digits :", options, images)
    (figure,) = figures
    title, below = (text.get_text() for text in figure.texts[:2])
    assert below.startswith("prompt: read all digits :\nzipvl rewrote ") and "of the 2 attentions" in below
    if "keep_ratio" in options:
        assert title.startswith("zipvl keeps 30% of this prompt's 517 tokens")
        rows = [row for row in explanation.rows if row.kind == "prefill"]
        said = [axes.get_yticklabels() for axes in figure.axes if axes.get_label().startswith("text tokens")]
        assert len(said[0]) == len(rows) and "rewrote 2 of" in below
        bars = next(axes for axes in figure.axes if axes.get_label() == "kept share").containers[0]
        assert [bar.get_height() for bar in bars] == pytest.approx([100 * row.fraction for row in rows])
    else:
        assert title.startswith("Every layer keeps all 517 tokens") and "rewrote 0 of" in below
        assert "This prompt stays dense, as all of fewer than 5000 tokens do" in " ".join(below.split())
    assert (tmp_path / "x.png").exists() and model._compiled_call_impl is None
