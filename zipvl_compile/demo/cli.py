"""The `zipvl` command: `zipvl demo`, `explain MODEL`, `eval`, `calibrate MODEL`, `measure`, `zipvl --version`."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

from zipvl_compile.dynamo import TRACING_LOGGERS
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.version import __version__

MISSING = "zipvl: the command line needs {name}, which is not installed: pip install 'zipvl-compile[demo]'"

try:
    import typer
    from rich.console import Console
except ImportError as error:
    print(MISSING.format(name=error.name), file=sys.stderr)
    raise SystemExit(2) from None

DEFAULT_PROMPT = "What is in this image?"
DEFAULT_OUTPUT = Path("demo.png")
IMAGE_HELP = "Image file; repeatable."
VIDEO_HELP = "Video file, or folder of its frames; repeatable."
FRAMES_HELP = "Most frames to take of a video, evenly chosen."
INNER_HELP = "Inner compiler of all models: inductor, aot_eager or eager."
OPTION_HELP = "Backend option, such as min_tokens=0; repeatable."

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse prefill and a compacted KV cache for Hugging Face vision-language models.",
)


def main() -> None:
    """Run the command line; the console script `zipvl`."""
    app()


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn what a user can put right into one line and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(MISSING.format(name=error.name))
    except (ImportError, ValueError, TypeError, OSError) as error:
        _fail(str(error))


def _fail(text: str) -> NoReturn:
    line = " ".join(text.split())
    typer.echo(line if line.startswith("zipvl") else f"zipvl: {line}", err=True)
    raise typer.Exit(2)


def _quiet() -> None:
    """Keep the terminal for the results: no bars and hints of transformers, no notes about graph breaks."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in TRACING_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"zipvl-compile {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=1, help="How many held-out questions the bundled model answers.")] = 18,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Local folder or hub name of another LVLM; needs --image or --video.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help=IMAGE_HELP + " With --model.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help=VIDEO_HELP + " With --model.")] = None,
    frames: Annotated[int, typer.Option(min=1, help=FRAMES_HELP)] = 16,
    prompt: Annotated[str, typer.Option(help="What to ask, with --model.")] = DEFAULT_PROMPT,
    tau: Annotated[float | None, typer.Option(help="The same as --option tau=... [default: 0.975].")] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP + " Shown beside the defaults.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer, with --model.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="Device, with --model [default: cuda if available, else cpu].")
    ] = None,
    output: Annotated[Path, typer.Option(help="Picture of what each layer kept.")] = DEFAULT_OUTPUT,
    inner: Annotated[str, typer.Option(hidden=True, help=INNER_HELP)] = "inductor",
) -> None:
    """Compare dense and zipvl answers, KV-cache memory and time: with default options, and with those given."""
    with _readable_errors():
        _check_output(output)
        options = _parse_options([*(option or []), *([] if tau is None else [f"tau={tau}"])])
        ZipVLOptions.parse({**options, "inner": inner})

        from zipvl_compile.demo.bundled import run_bundled
        from zipvl_compile.demo.media import read_media
        from zipvl_compile.demo.side_by_side import Setup, run_custom

        _quiet()
        setup, console = Setup(options, inner, output), Console()
        if model is None:
            if image or video:
                name = "--image" if image else "--video"
                raise ValueError(f"{name}: expected together with --model, got it alone. Add --model NAME_OR_PATH.")
            code = run_bundled(console, setup, questions, seed)
        else:
            if not image and not video:
                raise ValueError("--model: expected together with --image or --video, got it alone. Add --image FILE.")
            images, videos = read_media(image or [], video or [], frames)
            code = run_custom(console, setup, model, images, prompt, max_new_tokens, device, videos)
    raise typer.Exit(code)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Local folder or hub name of an LVLM.")],
    image: Annotated[list[Path] | None, typer.Option(help=IMAGE_HELP + " [default: a grey test image]")] = None,
    video: Annotated[list[Path] | None, typer.Option(help=VIDEO_HELP)] = None,
    frames: Annotated[int, typer.Option(min=1, help=FRAMES_HELP)] = 16,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = DEFAULT_PROMPT,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    device: Annotated[str | None, typer.Option(help="[default: cuda if available, else cpu]")] = None,
    cost: Annotated[bool, typer.Option("--cost", help="Predict from which length each layer gains.")] = False,
    output: Annotated[Path | None, typer.Option(help="Picture to draw of what each layer keeps of the prompt.")] = None,
) -> None:
    """List every attention of a model: rewritten or dense, and why; with --output, draw what each layer keeps."""
    with _readable_errors():
        if output is not None:
            _check_output(output)
        from PIL import Image

        from zipvl_compile.demo.media import read_media
        from zipvl_compile.demo.prompts import load, prompt_inputs
        from zipvl_compile.report.explain import explain as explain_model

        _quiet()
        options = _parse_options(option or [])
        ZipVLOptions.parse(options)
        images, videos = read_media(image or [], video or [], frames)
        if not images and not videos:
            images = [Image.new("RGB", (336, 336), "grey")]
        console = Console()
        with console.status(f"loading {model}"):
            loaded, processor = load(model, device)
        with console.status("compiling a prefill and a decode step"):
            inputs = prompt_inputs(processor, images, prompt, loaded.device, videos)
            explanation = explain_model(loaded, options=options, **inputs)
        console.print(explanation)
        if output is not None:
            from zipvl_compile.demo.explained import draw_explained
            from zipvl_compile.demo.side_by_side import say

            with console.status("reading the prompt for the picture"):
                draw_explained(output, explanation, loaded, processor, inputs, prompt, options, images, videos)
            say(console, f"What each layer keeps of the prompt: {output}", wrap=False)
        if cost:
            from zipvl_compile.report.costs import costs, prefill_speedup

            for line in costs(explanation, loaded.dtype, loaded.device):
                console.print(str(line), highlight=False)
            if (speedup := prefill_speedup(loaded, explanation, loaded.dtype, loaded.device)) is not None:
                console.print(f"Prefill of this prompt, all layers of the decoder: {speedup:.2f}x of dense predicted.")


@app.command()
def measure(
    device: Annotated[str | None, typer.Option(help="[default: cuda if available, else cpu]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Repeatable [default: float32 and bfloat16].")] = None,
    show: Annotated[bool, typer.Option("--show", help="Only show what the file says, and measure nothing.")] = False,
) -> None:
    """Measure this machine anew, for the default of min_tokens; running processes keep what they decided by."""
    with _readable_errors():
        import torch

        from zipvl_compile.report.machine import Speed, renewed
        from zipvl_compile.report.machine_file import key_of, path, read

        try:
            where = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device: expected one of this machine, got {device!r}. Leave it out.") from error
        for name in dtype or ["float32", "bfloat16"]:
            kind = getattr(torch, name, None)
            if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
                raise ValueError(f"--dtype: expected one such as bfloat16, got {name!r}.")
            key = key_of(where, kind)
            entry = read(key)
            old = entry and Speed(key, entry.speed, entry.origin, path())
            if show:
                typer.echo(old or f"Nothing is known of {key}; it would be in {path()}.")
                continue
            if old:
                typer.echo(f"was: {old}")
            typer.echo(renewed(where, kind))


@app.command("eval")
def evaluate(
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: few variants, documents, questions.")] = False,
    models: Annotated[str | None, typer.Option(help="[default: tiny_lvlm,smollm2,gemma3, without --model]")] = None,
    variants: Annotated[str | None, typer.Option(help="Names with commas between [default: all].")] = None,
    split: Annotated[str, typer.Option(help="report, or choose: what options may be tuned on.")] = "report",
    documents: Annotated[int | None, typer.Option(min=1, help="Most of them, a language model [default: 12].")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of a document in the prompt [default: 1024].")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="To an LVLM [default: 360].")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("zipvl-eval"),
    model: Annotated[str | None, typer.Option(help="Local folder or hub name of another model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Lines of image, question, answer for --model, an LVLM.")] = None,
) -> None:
    """Measure quality against kept tokens, KV bytes and FLOPs, for dense and every variant; draw the frontier."""
    with _readable_errors():
        from zipvl_compile.evaluate import frontier

        _quiet()
        given: dict[str, Any] = {
            "models": () if models is None and model else models and tuple(filter(None, models.split(","))),
            "variants": variants and tuple(name.strip() for name in variants.split(",")),
            "documents": documents, "tokens": tokens, "questions": questions,
        }  # fmt: skip
        changed = dict(frontier.QUICK_SETUP) if quick else {}
        changed |= {name: value for name, value in given.items() if value is not None}
        code = frontier.evaluate(
            Console(), frontier.Setup(**changed, split=split, output=output, model=model, data=data)
        )
    raise typer.Exit(code)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Local folder or hub name of an LVLM.")],
    data: Annotated[Path, typer.Option(help="Folder of pictures, or lines of image, question (JSON).")],
    prompt: Annotated[str, typer.Option(help="What to ask of the pictures of a folder.")] = DEFAULT_PROMPT,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    target_kl: Annotated[float, typer.Option(min=0.0, help="Most that selecting may cost, in nats.")] = 0.02,
    most: Annotated[int, typer.Option("--prompts", min=1, help="Most prompts to measure.")] = 16,
    device: Annotated[str | None, typer.Option(help="[default: cuda if available, else cpu]")] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("zipvl-calibration.json"),
) -> None:
    """Measure what selecting costs in each layer on your own pictures, and write the options to use."""
    with _readable_errors():
        from zipvl_compile.evaluate.calibration_report import run

        options = _parse_options(option or [])
        ZipVLOptions.parse(options)
        _quiet()
        run(Console(), model, data, prompt, options, target_kl, most, device, output)


def _check_output(output: Path) -> None:
    """Complain before anything is loaded and compiled, not after it."""
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output: expected a .png, .pdf or .svg file, got {str(output)!r}. Rename it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    there = output.exists()
    if output.is_dir() or not os.access(output if there else output.parent, os.W_OK):
        raise ValueError(f"--output: expected a file that can be written, got {str(output)!r}. Name another one.")


def _parse_options(texts: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in map(_parse_option, texts):
        if name in options:
            raise ValueError(f"--option: expected every name once, got {name!r} twice. Leave one out.")
        options[name] = value
    return options


def _parse_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option: expected key=value, got {text!r}. Write for instance --option min_tokens=0.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
