"""The result of `zipvl_compile.explain`: one row per attention, as text or as a rich table."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from zipvl_compile.passes.match.attention_site import AttentionShape
from zipvl_compile.passes.match.outcome import Kind
from zipvl_compile.passes.match.reasons import Reason


@dataclass(frozen=True)
class ExplainedSite:
    """One attention of one compiled graph.

    Attributes:
        layer: path of the module that holds the attention.
        kind: "prefill", "decode", or "other" for attention that zipvl does not consider.
        reason: why the attention stays dense; None where it was rewritten.
        kept: prompt tokens that the KV cache of this layer keeps, where known (tokens).
        prompt_length: of the prompt (tokens).
        pruned: projections that are computed only for the tokens that need them, such as "q, v, output".
        shape: what the cost of a prefill attention depends on.
        note: what was not done to it, though it was rewritten.
    """

    layer: str
    kind: Kind
    reason: Reason | None = None
    kept: int | None = None
    prompt_length: int = 0
    pruned: str = ""
    shape: AttentionShape | None = None
    note: Reason | None = None

    @property
    def outcome(self) -> str:
        """Return "rewritten" or "dense"."""
        return "dense" if self.reason else "rewritten"

    @property
    def fraction(self) -> float | None:
        """Return the fraction of prompt tokens kept, in [0, 1], where known."""
        return None if self.kept is None else self.kept / self.prompt_length

    @property
    def by_design(self) -> bool:
        """Return whether staying dense is what should happen, as for a vision tower or a prompt below `min_tokens`."""
        return self.reason is not None and self.reason.by_design

    @property
    def kept_text(self) -> str:
        return "" if self.kept is None else f"{self.kept} of {self.prompt_length} ({self.fraction:.1%})"

    @property
    def detail(self) -> str:
        """Return the kept tokens and the pruned projections, or why the attention stays dense."""
        if self.reason is not None:
            return str(self.reason)
        said = "" if self.note is None else str(self.note)
        return ", ".join(filter(None, [self.kept_text, self.pruned and f"pruned {self.pruned}", said]))


@dataclass(frozen=True)
class Explanation:
    """Every attention of a model under zipvl: `print` it, or pass it to rich's `Console.print`.

    Attributes:
        rows: one entry per attention and graph; graphs in execution order, layers in the order of the model.
        prompt_length: of the prompt (tokens).
        notes: what else a user should know, one sentence each.
    """

    rows: list[ExplainedSite]
    prompt_length: int
    notes: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[ExplainedSite]:
        return [row for row in self.rows if not row.reason]

    @property
    def dense(self) -> list[ExplainedSite]:
        return [row for row in self.rows if row.reason]

    @property
    def title(self) -> str:
        counts = f"{len(self.rewritten)} attention sites rewritten, {len(self.dense)} dense"
        return f"zipvl: {counts}; prompt of {self.prompt_length} tokens"

    def _cells(self) -> list[tuple[str, str, str, str]]:
        return [(row.layer, row.kind, row.outcome, row.detail) for row in self.rows]

    def __str__(self) -> str:
        cells = [("layer", "graph", "attention", "kept tokens, or why dense"), *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[3]]) for row in cells]
        return "\n".join([self.title, *(line.rstrip() for line in lines), *self.notes])

    def table(self) -> Any:
        """Return a `rich.table.Table`.

        Raises:
            ImportError: rich is not installed.
        """
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.caption, table.caption_justify = "\n".join(self.notes), "left"
        for header in ("layer", "graph", "attention"):
            table.add_column(header, overflow="fold")
        for name, row in zip(_short_names([row.layer for row in self.rows]), self.rows, strict=True):
            kept = "kept " if row.kept_text else ""
            detail = f"dense: {row.reason}" if row.reason else ", ".join(filter(None, ["rewritten", kept + row.detail]))
            table.add_row(name, row.kind, detail, style="yellow" if row.reason and not row.by_design else None)
        return table

    def __rich__(self) -> Any:
        return self.table()


def _short_names(layers: list[str]) -> list[str]:
    """Drop the modules that every path starts or ends with, such as `model.` and `.self_attn`, for narrow terminals."""
    paths = [layer.split(".") for layer in layers if not layer.startswith("(")]
    counts = []
    for directed in (paths, [path[::-1] for path in paths]):
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*directed, strict=False))
        counts.append(len(list(shared)))
    first, last = counts
    return [layer if layer.startswith("(") else ".".join(layer.split(".")[first:][: -last or None]) for layer in layers]
