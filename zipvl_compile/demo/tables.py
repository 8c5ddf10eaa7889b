"""The tables that `zipvl demo` prints; each fits 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from rich import box
from rich.table import Table

from zipvl_compile.demo.compare import Comparison, medians


def _table(title: str, *headers: str) -> Table:
    """Return a table whose first column is text and whose other columns are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left")
    return table


def accuracy(kinds: Sequence[str], dense: Sequence[bool], sparse: Sequence[bool], same: Sequence[bool]) -> Table:
    """Right answers per kind of question.

    Args:
        kinds: of every question.
        dense, sparse: whether each answer is right.
        same: whether the two answers of each question are identical.
    """
    table = _table("Right answers", "kind of question", "questions", "dense", "zipvl", "same answer")
    for kind in dict.fromkeys(kinds):
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        shares = [f"{mean(values[i] for i in chosen):.1%}" for values in (dense, sparse, same)]
        table.add_row(kind.replace("_", " "), str(len(chosen)), *shares)
    table.add_section()
    table.add_row("all", str(len(kinds)), *(f"{mean(values):.1%}" for values in (dense, sparse, same)), style="bold")
    return table


def kept(result: Comparison) -> Table:
    """Kept prompt tokens per decoder layer, means over the prompts."""
    table = _table("Kept prompt tokens (means)", "decoder layer", "tokens", "of prompt")
    rows = result.kept_per_layer()
    for layer, row in enumerate(rows):
        table.add_row(str(layer), *(("other cache", "") if row is None else (f"{row[0]:.1f}", f"{row[1]:.1%}")))
    known = [row for row in rows if row is not None]
    table.add_section()
    table.add_row("mean", f"{mean(r[0] for r in known):.1f}", f"{mean(r[1] for r in known):.1%}", style="bold")
    return table


def costs(result: Comparison) -> Table:
    """KV-cache memory (means) and time (medians) of both models, and zipvl over dense."""
    table = _table("Memory (means) and time (medians, taken in turns)", "", "dense", "zipvl", "zipvl / dense")

    def memory(name: str, size: str) -> None:
        dense, sparse = (mean(getattr(a, size) for a in answers) for answers in (result.dense, result.sparse))
        table.add_row(name, _bytes(dense), _bytes(sparse), f"{sparse / dense:.2f}")

    memory("KV cache: tokens in use", "kv_used")
    memory("KV cache: allocated, with headroom", "kv_allocated")
    (first, later), (sparse_first, sparse_later) = medians(result.dense), medians(result.sparse)
    table.add_row("prefill: time to first token", _ms(first), _ms(sparse_first), f"{sparse_first / first:.2f}")
    if later is not None and sparse_later is not None:
        table.add_row("decode: time per further token", _ms(later), _ms(sparse_later), f"{sparse_later / later:.2f}")
    return table


def examples(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """Questions with the right answer and the answers of both models."""
    table = Table(title="Examples", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for header in ("question", "right", "dense", "zipvl"):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row, style=None if row[2] == row[3] else "yellow")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _bytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
