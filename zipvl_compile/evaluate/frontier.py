"""`zipvl eval`: every model, every variant, with bars, and the results in a folder after each variant."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from zipvl_compile.evaluate import results
from zipvl_compile.evaluate.documents import documents
from zipvl_compile.evaluate.figure import FIGURE, draw
from zipvl_compile.evaluate.measures import Item, summary
from zipvl_compile.evaluate.models import KNOWN, TINY_LVLM, MissingPackageError, load_picture_model, load_text_model
from zipvl_compile.evaluate.picture_task import PictureTask, bundled_questions, grouped, read_questions
from zipvl_compile.evaluate.text_task import TextTask
from zipvl_compile.evaluate.variants import DENSE, QUICK, Options, chosen

Task = TextTask | PictureTask
SHOWN = ("nll_minus_dense", "rep_nll_minus_dense", "kl", "accuracy", "accuracy_minus_dense", "agreement", "kept",
         "kv_bytes_of_dense", "prefill_flops_of_dense")  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What to measure.

    Attributes:
        models: names of `KNOWN`.
        variants: names of `VARIANTS`; None is all.
        split: "report" or "choose", of documents and of questions.
        documents: most of them, for each language model.
        tokens: of a prompt made of a document.
        questions: to the bundled LVLM; of the lines of `data`, None takes all.
        output: folder of the results, made where it is missing.
        model: folder or hub name of one more model: a language model, or with `data` an LVLM.
        data: JSON lines, see `read_questions`.
    """

    models: tuple[str, ...] = KNOWN
    variants: tuple[str, ...] | None = None
    split: str = "report"
    documents: int = 12
    tokens: int = 1024
    questions: int = 360
    output: Path = Path("zipvl-eval")
    model: str | None = None
    data: Path | None = None


#: What --quick changes; what is given besides wins.
QUICK_SETUP: dict[str, Any] = {
    "models": (TINY_LVLM, "smollm2"),
    "variants": QUICK,
    "documents": 2,
    "tokens": 512,
    "questions": 36,
}


def evaluate(console: Console, setup: Setup) -> int:
    """Measure, and write JSON lines, a table and a figure; return the exit code, 1 if no model could be measured.

    Raises:
        ValueError: an unknown name, or a file that is not there; before anything is measured.
    """
    for name in setup.models:
        if name not in KNOWN:
            raise ValueError(f"--models: expected names among {', '.join(KNOWN)}, got {name!r}. Others need --model.")
    if setup.data is not None and setup.model is None:
        raise ValueError("--data: expected together with --model, got it alone. Add --model NAME_OR_PATH.")
    variants = chosen(setup.variants)
    documents(setup.split)
    if setup.data is not None:
        read_questions(setup.data, 1)
    setup.output.mkdir(parents=True, exist_ok=True)
    names = (*setup.models, *([] if setup.model is None else [setup.model]))
    measured = 0
    for name in names:
        try:
            with console.status(f"loading {name}"):
                task = make_task(name, setup)
        except MissingPackageError as error:
            _say(console, f"{name} is left out. {error}")
            continue
        run(console, task, variants, setup.output)
        measured += 1
    if not measured:
        return 1
    rows = results.newest(setup.output)
    draw(setup.output / FIGURE, rows)
    table = results.write_table(setup.output, rows)
    _say(console, f"{setup.output / results.LINES}, {table}, {setup.output / FIGURE}")
    return 0


def make_task(name: str, setup: Setup) -> Task:
    """Load a model, and what it is asked."""
    if name == TINY_LVLM:
        model, processor = load_picture_model(name)
        asked = bundled_questions(setup.questions, setup.split)
        return PictureTask(name, model, processor, asked, f"held-out questions ({setup.split})")
    label = Path(name).name or name
    if name == setup.model and setup.data is not None:
        model, processor = load_picture_model(name)
        return PictureTask(label, model, processor, read_questions(setup.data, None), f"questions of {setup.data.name}")
    model, tokenizer = load_text_model(name)
    return TextTask(label, model, tokenizer, documents(setup.split), setup.split, setup.tokens, setup.documents)


def run(console: Console, task: Task, variants: dict[str, Options], output: Path) -> None:
    """Measure one model with every variant that says something about it, and show a table of the main results."""
    taken = {name: options for name, options in variants.items() if task.takes(options)}
    dense: list[Item] = []
    found: dict[str, dict[str, tuple[float, str]]] = {}
    with _progress(console) as progress:
        whole = progress.add_task(task.case, total=len(taken) * task.count)
        for name, options in taken.items():
            progress.update(whole, description=f"{task.case}: {name}")
            start = time.perf_counter()
            items = task.run(options, lambda: progress.advance(whole))
            dense = items if name == DENSE else dense
            found[name] = {**summarised(items, dense), "seconds": (time.perf_counter() - start, "seconds")}
            results.append(output, task.case, name, found[name])
            results.append_items(output, task.case, name, items)
    console.print(_table(task.case, found))


def summarised(items: Sequence[Item], dense: Sequence[Item]) -> dict[str, tuple[float, str]]:
    """Return `metric -> (value, unit)` over all items, then the accuracy of each group of them: `accuracy_read_all`."""
    found = summary(items, dense)
    for group, indices in grouped(items).items():
        part = summary([{"accuracy": items[i]["accuracy"]} for i in indices], [dense[i] for i in indices])
        found |= {metric.replace("accuracy", f"accuracy_{group}"): value for metric, value in part.items()}
    return found


def _table(case: str, found: dict[str, dict[str, tuple[float, str]]]) -> Table:
    metrics = [metric for metric in SHOWN if any(metric in values for values in found.values())]
    table = Table(title=case, title_justify="left")
    table.add_column("variant")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for name, values in found.items():
        table.add_row(name, *_cells(values, metrics))
    return table


def _cells(values: dict[str, tuple[float, str]], metrics: Iterable[str]) -> Iterable[str]:
    for metric in metrics:
        error = values.get(f"{metric}_se")
        yield (
            "" if metric not in values else f"{values[metric][0]:.3f}" + ("" if error is None else f" ±{error[0]:.3f}")
        )


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)  # paths can be copied
