"""`zipvl demo` without a model: the bundled one answers questions about large pictures of digits it never saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from zipvl_compile.demo import tables
from zipvl_compile.demo.budgets import BUDGETS, Budgeted, at_budgets, random_tokens
from zipvl_compile.demo.compare import Comparison
from zipvl_compile.demo.prompts import load, prompt_inputs
from zipvl_compile.demo.side_by_side import Setup, draw, measure, progress_bar, say
from zipvl_compile.demo.tiny_lvlm import LARGE_CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.canvas import canvas_of
from zipvl_compile.demo.tiny_lvlm.evaluate import DemoQuestion, exact_match, questions_for_demo
from zipvl_compile.demo.tiny_lvlm.questions import SINGLE_TOKEN_KINDS

#: Fewer identical answers than this is a failure.
LEAST_AGREEMENT = 0.98
#: Every answer is shorter.
MAX_NEW_TOKENS = 8
EXAMPLES = 4
#: How many questions are asked at each budget.
AT_BUDGETS = 9


@dataclass(frozen=True)
class Bundled:
    """What the demo found.

    Attributes:
        result: all answers.
        right: whether each of them is right, by the name of who gave it.
        budgets: how few tokens do; empty where every token was kept.
    """

    result: Comparison
    right: dict[str, list[bool]]
    budgets: list[Budgeted] = field(default_factory=list)


def run_bundled(console: Console, setup: Setup, questions: int, seed: int = 0) -> int:
    """Run the demo; return the exit code.

    Args:
        console: where everything is printed.
        setup: see `Setup`.
        questions: how many are asked.
        seed: of the questions.

    Returns:
        0, or 1 if without options fewer than `LEAST_AGREEMENT` of the answers are the same with and without zipvl;
        with options, how many are is what the user wants to see.

    Raises:
        ValueError: the trained model is not there.
    """
    agreement = ask_bundled(console, setup, questions, seed).result.agreement
    if setup.options or agreement >= LEAST_AGREEMENT:
        return 0
    say(console, f"FAILED: {agreement:.1%} of the answers agree, at least {LEAST_AGREEMENT:.0%} should.", "bold red")
    return 1


def ask_bundled(console: Console, setup: Setup, questions: int, seed: int = 0) -> Bundled:
    """Ask the bundled model, print what each column of `measure` says and takes, draw a picture; see `run_bundled`."""
    if not (LARGE_CHECKPOINT / "config.json").exists():
        raise ValueError(
            f"model: expected the trained model in {LARGE_CHECKPOINT}, got nothing there. Run `make train`."
        )
    model, processor = load(str(LARGE_CHECKPOINT), "cpu")
    asked = list(questions_for_demo(questions, seed, canvas=canvas_of(model.config)))
    prompts = [prompt_inputs(processor, question.image, question.prompt) for question in asked]
    (width, height), n = asked[0].image.size, prompts[0]["input_ids"].shape[1]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        console,
        f"zipvl demo: a LLaVA of {millions:.1f} M parameters answers {len(asked)} questions about handwritten digits "
        f"that it was not trained on, in pictures of {width} x {height} pixels: prompts of {n} tokens.",
        "bold",
    )
    # The prompts differ by a word or two: without dynamic=True, the models would compile for one length first.
    models, result = measure(console, setup, model, processor, prompts[:1], prompts, MAX_NEW_TOKENS, dynamic=True)
    right = {
        name: [exact_match(a.text, question.answer) for a, question in zip(answers, asked, strict=True)]
        for name, answers in result.answers.items()
    }
    lengths = ["one word" if question.kind in SINGLE_TOKEN_KINDS else "several words" for question in asked]
    console.print(tables.accuracy(lengths, right, result.same))
    console.print(tables.examples(list(result.answers), _examples(asked, result, right["dense"])))
    console.print(tables.kept(result))
    console.print(tables.costs(result))
    budgets = []
    if any(row is not None and row[1] < 1 for row in result.kept_per_layer()):
        budgets = _budgets(console, model, list(models.values())[-1], processor, asked, prompts)
        console.print(tables.budgets(budgets))
    # A right answer that needs the most patches shows best what is kept.
    by = list(zip(right["dense"], result.same, (len(one.answer.split()) for one in asked), strict=True))
    shown = max(range(len(asked)), key=lambda i: (*by[i], asked[i].kind == "read_all"))
    answers = {name: given[shown] for name, given in result.answers.items()}
    one = asked[shown]
    draw(console, setup, model, processor, prompts[shown], [one.image], _words(one), answers, one.cells)
    say(console, tables.won(result), "bold")
    return Bundled(result, right, budgets)


def _budgets(
    console: Console, model: Any, compiled: Any, processor: Any, asked: list[DemoQuestion], prompts: list
) -> list[Budgeted]:
    few = slice(0, AT_BUDGETS)
    draws = random_tokens(model)
    with progress_bar(console) as progress:
        task = progress.add_task("smaller budgets", total=2 * len(BUDGETS) * len(asked[few]))
        return at_budgets(
            compiled, draws, processor, asked[few], prompts[few], MAX_NEW_TOKENS, lambda: progress.advance(task)
        )


def _examples(asked: list[DemoQuestion], result: Comparison, right: list[bool]) -> list[tuple[str, ...]]:
    """Return a few questions with the right answer and those of every model.

    First those that differ, then one of each kind, which dense answered rightly if it did so with any.
    """
    rows: dict[str, tuple[str, ...]] = {}
    for i in sorted(range(len(asked)), key=lambda i: not right[i]):
        question = asked[i]
        row = (_words(question), question.answer, *(answers[i].text for answers in result.answers.values()))
        rows.setdefault(question.kind if result.same[i] else f"differs {len(rows)}", row)
    return sorted(rows.values(), key=lambda row: row[2] == row[-1])[:EXAMPLES]


def _words(question: DemoQuestion) -> str:
    return question.prompt.removeprefix("<image>").strip()
