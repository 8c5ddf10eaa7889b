"""`zipvl demo`: dense and zipvl answers, memory and time side by side, on the bundled model or on any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from zipvl_compile.demo import tables
from zipvl_compile.demo.budgets import BUDGETS, at_budgets, random_tokens
from zipvl_compile.demo.compare import Answer, Comparison, compare, compiled_copy, reached, warm_up
from zipvl_compile.demo.plots import draw_kept_patches, draw_kept_strips
from zipvl_compile.demo.prompts import image_positions, load, model_view, patch_grid, prompt_inputs
from zipvl_compile.demo.tiny_lvlm import LARGE_CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.canvas import canvas_of
from zipvl_compile.demo.tiny_lvlm.evaluate import DemoQuestion, exact_match, questions_for_demo
from zipvl_compile.demo.tiny_lvlm.questions import SINGLE_TOKEN_KINDS
from zipvl_compile.report.compile_report import collect, left_dense

#: Fewer identical answers than this on the bundled model is a failure.
LEAST_AGREEMENT = 0.98
#: Every answer of the bundled model is shorter.
MAX_NEW_TOKENS = 8
#: Repetitions for the times of a single prompt.
REPEATS = 5
EXAMPLES = 4
#: How many questions are asked at each budget.
AT_BUDGETS = 9


@dataclass(frozen=True)
class Setup:
    """How a demo runs.

    Attributes:
        options: of zipvl that were chosen; what they do is shown beside the defaults.
        inner: the compiler of all models.
        output: the picture to write.
    """

    options: dict[str, Any] = field(default_factory=dict)
    inner: str = "inductor"
    output: Path = Path("demo.png")

    def chosen(self, left_dense: bool) -> dict[str, Any] | None:
        """Return the options to show beside the defaults, or None where those show all.

        Args:
            left_dense: the defaults leave the prompts dense, so that only `min_tokens=0` shows what zipvl does.
        """
        options = {"min_tokens": 0, **self.options} if left_dense else self.options
        return options or None


def run_bundled(console: Console, setup: Setup, questions: int = 18, seed: int = 0) -> int:
    """Answer held-out questions with the bundled model; return the exit code.

    Args:
        console: where everything is printed.
        setup: see `Setup`.
        questions: how many.
        seed: of the questions.

    Returns:
        0, or 1 if without options fewer than `LEAST_AGREEMENT` of the answers are the same with and without zipvl;
        with options, how many are is what the user wants to see.

    Raises:
        ValueError: the trained model is not there.
    """
    if not (LARGE_CHECKPOINT / "config.json").exists():
        raise ValueError(
            f"model: expected the trained model in {LARGE_CHECKPOINT}, got nothing there. Run `make train`."
        )
    model, processor = load(str(LARGE_CHECKPOINT), "cpu")
    asked = list(questions_for_demo(questions, seed, canvas=canvas_of(model.config)))
    prompts = [prompt_inputs(processor, question.image, question.prompt) for question in asked]
    width, height = asked[0].image.size
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    n = prompts[0]["input_ids"].shape[1]
    _say(
        console,
        f"zipvl demo: a LLaVA of {millions:.1f} M parameters answers {len(asked)} questions about handwritten digits "
        f"that it was not trained on, in pictures of {width} x {height} pixels: prompts of {n} tokens.",
        "bold",
    )
    # The prompts differ by a word or two: without dynamic=True, the models would compile for one length first.
    models, result = _measure(console, setup, model, processor, prompts[:1], prompts, MAX_NEW_TOKENS, dynamic=True)
    lengths = ["one word" if question.kind in SINGLE_TOKEN_KINDS else "several words" for question in asked]
    right = {
        name: [exact_match(a.text, question.answer) for a, question in zip(answers, asked, strict=True)]
        for name, answers in result.answers.items()
    }
    console.print(tables.accuracy(lengths, right, result.same))
    console.print(tables.examples(list(result.answers), _examples(asked, result)))
    _print_costs(console, result)
    if any(row is not None and row[1] < 1 for row in result.kept_per_layer()):
        _print_budgets(console, setup, model, list(models.values())[-1], processor, asked, prompts)
    # The question that needs the most patches shows best what is kept.
    shown = max(range(len(asked)), key=lambda i: (result.same[i], asked[i].kind == "read_all", len(asked[i].answer)))
    answers = {name: given[shown] for name, given in result.answers.items()}
    question = _words(asked[shown])
    _draw(console, setup, model, processor, prompts[shown], asked[shown].image, question, answers, asked[shown].cells)
    _say(console, tables.won(result), "bold")
    if setup.options:
        return 0
    if result.agreement < LEAST_AGREEMENT:
        agree = f"{result.agreement:.1%} of the answers agree, at least {LEAST_AGREEMENT:.0%} should"
        _say(console, f"FAILED: {agree}.", "bold red")
        return 1
    return 0


def run_custom(
    console: Console, setup: Setup, name: str, image: Image.Image, prompt: str, max_new_tokens: int, device: str | None
) -> int:
    """Answer one prompt about one image with any Hugging Face LVLM; return the exit code 0.

    Args:
        console: where everything is printed.
        setup: see `Setup`.
        name: local folder or hub name.
        image: RGB.
        prompt: what to ask.
        max_new_tokens: of the answer.
        device: None takes CUDA where there is one.

    Raises:
        ValueError: the model cannot be loaded, or zipvl does not reach its prefill.
    """
    with console.status(f"loading {name}"):
        model, processor = load(name, device)
    inputs = prompt_inputs(processor, image, prompt, model.device)
    n = inputs["input_ids"].shape[1]
    _say(console, f"zipvl demo: {name} on {model.device}, a prompt of {n} tokens", "bold")
    _, result = _measure(console, setup, model, processor, [inputs], [inputs] * REPEATS, max_new_tokens, dynamic=None)
    for label, given in result.answers.items():
        console.print(f"[bold]{label}[/bold] ", end="")
        _say(console, given[0].text)
    _say(console, "The answers are the same." if result.same[0] else "The answers differ.", "dim")
    _print_costs(console, result)
    answers = {label: given[0] for label, given in result.answers.items()}
    _draw(console, setup, model, processor, inputs, image, prompt, answers)
    _say(console, tables.won(result), "bold")
    return 0


def _measure(
    console: Console,
    setup: Setup,
    model: Any,
    processor: Any,
    warm_prompts: list,
    prompts: list,
    max_new_tokens: int,
    dynamic: bool | None,
) -> tuple[dict[str, Any], Comparison]:
    """Compile dense, zipvl as it is by default, and zipvl with the chosen options; answer `prompts` with all."""
    models: dict[str, Any] = {}

    def add(name: str, options: dict[str, Any] | None) -> str | None:
        """Compile one model; return what zipvl says of prompts that it leaves dense."""
        models[name] = compiled_copy(model, options, setup.inner, dynamic)
        with _progress(console) as progress, collect() as reports:
            task = progress.add_task(f"compiling {name}", total=None)
            warm_up(models[name], processor, warm_prompts)
            progress.update(task, total=1, completed=1)
        if options is None:
            return None
        return left_dense(site.reason for site in reached(model, reports))

    _say(console, f'  dense   model.compile(backend="{setup.inner}")')
    add("dense", None)
    _say_options(console, setup, "zipvl", {})
    dense = add("zipvl", {})
    if dense is not None:
        _say(console, f"          By default, {dense}", "dim")
    chosen = setup.chosen(dense is not None)
    if chosen is not None:
        _say_options(console, setup, "chosen", chosen)
        dense = add("chosen", chosen)
        if dense is not None:
            _say(console, f"          With these options, {dense}", "dim")
    with _progress(console) as progress:
        task = progress.add_task("answering in turns", total=len(prompts))
        return models, compare(models, processor, prompts, max_new_tokens, lambda: progress.advance(task))


def _say_options(console: Console, setup: Setup, name: str, options: dict[str, Any]) -> None:
    given = options if setup.inner == "inductor" else {**options, "inner": setup.inner}
    said = f", options={given}" if given else ""
    _say(console, f'  {name:7} model.compile(backend="zipvl"{said})'.replace("'", '"'))


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def _print_costs(console: Console, result: Comparison) -> None:
    console.print(tables.kept(result))
    console.print(tables.costs(result))


def _print_budgets(
    console: Console, setup: Setup, model: Any, compiled: Any, processor: Any, asked: list[DemoQuestion], prompts: list
) -> None:
    few = slice(0, AT_BUDGETS)
    draws = random_tokens(model, setup.inner)
    with _progress(console) as progress:
        task = progress.add_task("smaller budgets", total=2 * len(BUDGETS) * len(asked[few]))
        found = at_budgets(
            compiled, draws, processor, asked[few], prompts[few], MAX_NEW_TOKENS, lambda: progress.advance(task)
        )
    console.print(tables.budgets(found))


def _examples(asked: list[DemoQuestion], result: Comparison) -> list[tuple[str, ...]]:
    """Return a few questions with the right answer and those of every model: those that differ, then one per kind."""
    rows: dict[str, tuple[str, ...]] = {}
    for i, question in enumerate(asked):
        row = (_words(question), question.answer, *(answers[i].text for answers in result.answers.values()))
        rows.setdefault(question.kind if result.same[i] else f"differs {len(rows)}", row)
    return sorted(rows.values(), key=lambda row: row[2] == row[-1])[:EXAMPLES]


def _words(question: DemoQuestion) -> str:
    return question.prompt.removeprefix("<image>").strip()


def _draw(
    console: Console,
    setup: Setup,
    model: Any,
    processor: Any,
    inputs: dict,
    image: Image.Image,
    question: str,
    answers: Mapping[str, Answer],
    cells: Sequence[tuple[int, int]] = (),
) -> None:
    """Draw what the last of the answers was given with; `cells` are to be enlarged."""
    answer = list(answers.values())[-1]
    kept = {layer: positions for layer, positions in enumerate(answer.kept) if positions is not None}
    if not kept:
        _say(console, "No layer has a cache of which zipvl could keep a part: no picture.")
        return
    said = "".join(f"\n{name}: {given.text}" for name, given in answers.items())
    title = f"question: {question}{said}"
    view, grid = model_view(processor, inputs, image), patch_grid(model.config, inputs)
    if grid is None:
        draw_kept_strips(setup.output, view, kept, answer.prompt_length, title)
    else:
        where = image_positions(model.config, inputs)
        draw_kept_patches(setup.output, view, kept, where, grid, answer.prompt_length, title, cells)
    _say(console, f"Which image patches each layer kept: {setup.output}")


def _say(console: Console, text: str, style: str | None = None) -> None:
    # Model names and answers may hold brackets, which rich would read as markup.
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=False)
