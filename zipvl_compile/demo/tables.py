"""The tables that `zipvl demo` prints; each fits 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from rich import box
from rich.markup import escape
from rich.table import Table

from zipvl_compile.demo.budgets import Budgeted
from zipvl_compile.demo.compare import Comparison, medians


def _table(title: str, *headers: str) -> Table:
    """Return a table whose first column is text and whose other columns are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left")
    return table


def accuracy(kinds: Sequence[str], right: Mapping[str, Sequence[bool]], same: Sequence[bool]) -> Table:
    """Right answers per kind of question.

    Args:
        kinds: of every question.
        right: whether each answer is right, by the name of who gave it.
        same: whether the first and the last answer of each question are identical.
    """
    table = _table("Right answers", "kind of question", "questions", *right, "same answer")
    for kind in dict.fromkeys(kinds):
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        shares = [f"{mean(values[i] for i in chosen):.1%}" for values in (*right.values(), same)]
        table.add_row(kind.replace("_", " "), str(len(chosen)), *shares)
    table.add_section()
    table.add_row("all", str(len(kinds)), *(f"{mean(values):.1%}" for values in (*right.values(), same)), style="bold")
    return table


def kept(result: Comparison) -> Table:
    """Kept prompt tokens per decoder layer, means over the prompts; layers of another kind by their names."""
    name = list(result.answers)[-1]
    table = _table(f"Kept prompt tokens of {name} (means)", "decoder layer", "tokens", "of prompt")
    rows, kinds = result.kept_per_layer(), result.sparse[0].kinds
    for layer, row in enumerate(rows):
        table.add_row(str(layer), *((kinds[layer], "") if row is None else (f"{row[0]:.1f}", f"{row[1]:.1%}")))
    known = [row for row in rows if row is not None]
    if known:
        table.add_section()
        table.add_row("mean", f"{mean(r[0] for r in known):.1f}", f"{mean(r[1] for r in known):.1%}", style="bold")
    return table


def costs(result: Comparison) -> Table:
    """KV-cache memory (means) and time (medians) of every model, and how many times that of dense."""
    table = _table("Memory (means) and time (medians, taken in turns)", "", *result.answers)

    def row(name: str, values: list[float], shown: Callable[[float], str]) -> None:
        first, *others = values
        table.add_row(name, shown(first), *(f"{shown(value)} ({value / first:.2f}x)" for value in others))

    for name, size in (("KV cache in use", "kv_used"), ("KV cache with headroom", "kv_allocated")):
        row(name, [mean(getattr(a, size) for a in answers) for answers in result.answers.values()], _bytes)
    firsts, laters = zip(*(medians(answers) for answers in result.answers.values()), strict=True)
    row("prefill: first token", list(firsts), _ms)
    if None not in laters:
        row("decode: further token", list(laters), _ms)
    return table


def budgets(found: Sequence[Budgeted]) -> Table:
    """Right answers at given budgets, with chosen tokens and with random ones."""
    table = _table("Right answers with fewer tokens", "kept by each layer", "chosen by zipvl", "as many random ones")
    for row in found:
        shares = (f"{sum(right)} of {len(right)}" for right in (row.chosen, row.drawn))
        table.add_row(f"{row.share:.0%} of the prompt", *shares)
    return table


def won(result: Comparison) -> str:
    """Return one line: what the last of the answers took, beside dense."""
    (first, later), (first_now, later_now) = medians(result.dense), medians(result.sparse)
    size, size_now = (mean(a.kv_allocated for a in answers) for answers in (result.dense, result.sparse))
    parts = [f"prefill {_times(first, first_now, 'faster', 'slower')} ({_ms(first)} -> {_ms(first_now)})"]
    if later is not None and later_now is not None:
        parts.append(f"decode {_times(later, later_now, 'faster', 'slower')} ({_ms(later)} -> {_ms(later_now)})")
    parts.append(f"KV cache {_times(size, size_now, 'smaller', 'larger')} ({_bytes(size)} -> {_bytes(size_now)})")
    parts.append(f"{sum(result.same)} of {len(result.same)} answers the same")
    return f"{list(result.answers)[-1]}: {', '.join(parts)}."


def _times(before: float, now: float, better: str, worse: str) -> str:
    return f"{before / now:.1f}x {better}" if now <= before else f"{now / before:.1f}x {worse}"


def examples(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Questions with the right answer and the answers of every model."""
    table = Table(title="Examples", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for header in ("question", "right", *names):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row), style=None if row[2] == row[-1] else "yellow")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _bytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
