"""`zipvl demo`: dense and zipvl answers, memory and time side by side; here of any Hugging Face LVLM."""

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
from zipvl_compile.demo.compare import Answer, Comparison, compare, compiled_copy, reached, warm_up
from zipvl_compile.demo.layout import layout_of
from zipvl_compile.demo.media import Video
from zipvl_compile.demo.plots import Kept, kept_figure, save
from zipvl_compile.demo.prompts import load, prompt_inputs
from zipvl_compile.report.compile_report import collect, left_dense

#: Repetitions for the times of a single prompt.
REPEATS = 5


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


def run_custom(
    console: Console,
    setup: Setup,
    name: str,
    images: Sequence[Image.Image],
    prompt: str,
    max_new_tokens: int,
    device: str | None,
    videos: Sequence[Video] = (),
) -> int:
    """Answer one prompt about images and videos with any Hugging Face LVLM; return the exit code 0.

    Args:
        console: where everything is printed.
        setup: see `Setup`.
        name: local folder or hub name.
        images: RGB.
        prompt: what to ask.
        max_new_tokens: of the answer.
        device: None takes CUDA where there is one.
        videos: behind the images.

    Raises:
        ValueError: the model cannot be loaded, or zipvl does not reach its prefill.
    """
    with console.status(f"loading {name}"):
        model, processor = load(name, device)
    inputs = prompt_inputs(processor, images, prompt, model.device, videos)
    n = inputs["input_ids"].shape[1]
    say(console, f"zipvl demo: {name} on {model.device}, a prompt of {n} tokens", "bold")
    _, result = measure(console, setup, model, processor, [inputs], [inputs] * REPEATS, max_new_tokens, dynamic=None)
    for label, given in result.answers.items():
        console.print(f"[bold]{label}[/bold] ", end="")
        say(console, given[0].text)
    say(console, "The answers are the same." if result.same[0] else "The answers differ.", "dim")
    console.print(tables.kept(result))
    console.print(tables.costs(result))
    answers = {label: given[0] for label, given in result.answers.items()}
    draw(console, setup, model, processor, inputs, images, prompt, answers, videos=videos)
    say(console, tables.won(result), "bold")
    return 0


def measure(
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
        with progress_bar(console) as progress, collect() as reports:
            task = progress.add_task(f"compiling {name}", total=None)
            warm_up(models[name], processor, warm_prompts)
            progress.update(task, total=1, completed=1)
        if options is None:
            return None
        return left_dense(site.reason for site in reached(model, reports))

    say(console, f'  dense   model.compile(backend="{setup.inner}")')
    add("dense", None)
    _say_options(console, setup, "zipvl", {})
    dense = add("zipvl", {})
    if dense is not None:
        say(console, f"          By default, {dense}", "dim")
    chosen = setup.chosen(dense is not None)
    if chosen is not None:
        _say_options(console, setup, "chosen", chosen)
        dense = add("chosen", chosen)
        if dense is not None:
            say(console, f"          With these options, {dense}", "dim")
    with progress_bar(console) as progress:
        task = progress.add_task("answering in turns", total=len(prompts))
        return models, compare(models, processor, prompts, max_new_tokens, lambda: progress.advance(task))


def _say_options(console: Console, setup: Setup, name: str, options: dict[str, Any]) -> None:
    given = options if setup.inner == "inductor" else {**options, "inner": setup.inner}
    said = f", options={given}" if given else ""
    say(console, f'  {name:7} model.compile(backend="zipvl"{said})'.replace("'", '"'))


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Show a bar for each task of what is yielded."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def draw(
    console: Console,
    setup: Setup,
    model: Any,
    processor: Any,
    inputs: dict,
    images: Sequence[Image.Image],
    question: str,
    answers: Mapping[str, Answer],
    cells: Sequence[tuple[int, int]] = (),
    videos: Sequence[Video] = (),
) -> None:
    """Draw what the last of the answers was given with; `cells` of the first image are to be enlarged."""
    answer = list(answers.values())[-1]
    if all(positions is None for positions in answer.kept):
        say(console, "No layer has a cache of which zipvl could keep a part: no picture.")
        return
    kept = Kept(answer.kept, answer.kinds, answer.kv_used, next(iter(answers.values())).kv_used)
    said = [f"question: {question}", *(f"{name}: {given.text}" for name, given in answers.items())]
    if setup.options.get("groups") == "kv_head":
        said.append("Every KV head keeps tokens of its own; those of the first head are drawn.")
    layout = layout_of(model.config, processor, inputs, images, [video.frames for video in videos])
    save(kept_figure(layout, kept, said, cells), setup.output)
    say(console, f"What each layer kept of the prompt: {setup.output}", wrap=False)


def say(console: Console, text: str, style: str | None = None, wrap: bool = True) -> None:
    """Print a text as it is; a path, on one line (`wrap=False`), can be copied and clicked."""
    # Model names and answers may hold brackets, which rich would read as markup.
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=not wrap)
