"""The result of `explain`: rows, counts, text and table."""

from __future__ import annotations

import pytest

from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.report.explanation import ExplainedSite, Explanation

LAYER = "model.language_model.layers.{}.self_attn"
ROWS = [
    ExplainedSite(LAYER.format(0), "prefill", None, 15, 60, pruned="q, v"),
    ExplainedSite(LAYER.format(1), "prefill", Reason(Why.MASK_SHAPE, "its mask is odd"), 60, 60),
    ExplainedSite(LAYER.format(0), "decode", None, None, 60),
    ExplainedSite("model.vision.layers.0.self_attn", "other", Reason(Why.ENCODER, "no KV cache"), None, 60),
]
EXPLAINED = Explanation(ROWS, 60, ["A note."])


def test_what_was_rewritten_and_what_was_not():
    assert EXPLAINED.rewritten == [ROWS[0], ROWS[2]] and EXPLAINED.dense == [ROWS[1], ROWS[3]]
    assert [row.outcome for row in ROWS] == ["rewritten", "dense", "rewritten", "dense"]
    assert [row.fraction for row in ROWS] == [0.25, 1, None, None]


@pytest.mark.parametrize(
    ("row", "detail"),
    list(zip(ROWS, ["15 of 60 (25.0%), pruned q, v", "its mask is odd", "", "no KV cache"], strict=True)),
)
def test_the_detail_is_what_was_kept_or_why_not(row, detail):
    assert row.detail == detail


def test_text_has_a_title_a_head_a_line_per_row_and_the_notes():
    title, head, *lines, note = str(EXPLAINED).splitlines()
    assert title == "zipvl: 2 attention sites rewritten, 2 dense; prompt of 60 tokens" and note == "A note."
    assert head.split()[:3] == ["layer", "graph", "attention"]
    assert [line.split()[:3] for line in lines] == [[row.layer, row.kind, row.outcome] for row in ROWS]
    assert len({line.index(row.kind) for line, row in zip(lines, ROWS, strict=True)}) == 1, "columns stand in line"
    assert all(line == line.rstrip() for line in lines)


def test_the_table_shortens_names_and_colours_what_nobody_wanted():
    console_of = pytest.importorskip("rich.console", reason="an extra: pip install 'zipvl-compile[demo]'").Console
    table = EXPLAINED.table()
    assert [row.style for row in table.rows] == [None, "yellow", None, None]
    console = console_of(width=80, record=True)
    console.print(EXPLAINED)
    shown = console.export_text()
    assert "language_model.layers.0 " in shown and ".self_attn" not in shown and "model.vision" not in shown
    assert "dense: its mask is odd" in shown and "A note." in shown
