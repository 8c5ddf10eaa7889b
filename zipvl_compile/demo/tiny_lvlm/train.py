"""Train the tiny LVLM: ``python -m zipvl_compile.demo.tiny_lvlm.train --out DIR``.

Four stages, for the small canvas about 70 minutes on one CPU core, for the large one 50 on two:

* ``align``: vision tower and projector alone.  Every patch must say its digit, colour, row and column
  in the (random, fixed) word embeddings of the language model.  Without this stage the language model
  does not learn to look.
* ``compact``: language model alone, on short sequences that hold the patches with digits and a growing
  number of random background patches, at their true positions.  Questions are cheap here, and the
  model learns not to mind absent background.
* ``full``: everything, half of the steps on whole images and half on images with a random number of
  background patches left out.  Of the large canvas the sequences grow here to a thousand patches.
* ``polish``: the same again at a smaller rate, with more of the questions that are still weak.

In all question stages the word that a question turns on ("red" in "what digit is red ?") is asked for
the answer too; without that hint it takes far longer until the last word of the prompt learns to look
both at that word and at the picture.

No stage knows anything of token selection inside a layer: attention is dense over whatever the
sequence holds.  On the large canvas the loss has rows that look for nothing rest on ``<bos>``, as those of
pretrained models do: see ``resting``; in its last stage the background in the sequence weighs as much as that of
the whole picture.  Every stage has its own seed, and ``--resume`` skips the stages
already finished under ``DIR``.  The shipped checkpoint of the small canvas was trained with ``--threads 1``;
other thread counts round differently.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import LlavaForConditionalGeneration

from zipvl_compile.demo.tiny_lvlm.build import build_model, build_processor
from zipvl_compile.demo.tiny_lvlm.canvas import SMALL
from zipvl_compile.demo.tiny_lvlm.evaluate import accuracy_per_kind, questions_for_demo, summary
from zipvl_compile.demo.tiny_lvlm.recipe import RECIPES, Recipe
from zipvl_compile.demo.tiny_lvlm.stages import STAGES

console = Console()


def train(out: Path, recipe: Recipe, resume: bool = False) -> None:
    """Run all stages, evaluate on held-out digits with ``generate``, write the checkpoint to ``out``."""
    model = build_model(recipe.seed, recipe.canvas)
    minutes: dict[str, float] = {}
    for name, stage in STAGES.items():
        folder = out / "stages" / name
        clock = folder / "minutes.json"  # written last: it marks a finished stage
        if resume and clock.exists():
            model = LlavaForConditionalGeneration.from_pretrained(folder)
            minutes[name] = json.loads(clock.read_text())
            console.log(f"{name}: taken from {folder}")
            continue
        started = time.monotonic()
        _run_stage(name, stage(model.train(), recipe), getattr(recipe, f"{name}_steps"), model, folder)
        minutes[name] = round((time.monotonic() - started) / 60, 1)
        clock.write_text(json.dumps(minutes[name]))
    save(model, out, recipe, minutes)


def save(model: LlavaForConditionalGeneration, out: Path, recipe: Recipe, minutes: dict[str, float]) -> None:
    """Write weights, processor and ``training.json`` with the held-out accuracy to ``out``."""
    model.eval().save_pretrained(out)
    processor = build_processor(recipe.canvas)
    processor.save_pretrained(out)
    count = 1800 if recipe.canvas == SMALL else 90
    questions = questions_for_demo(count, seed=999, canvas=recipe.canvas)
    accuracy = summary(accuracy_per_kind(model, processor, questions, 32 if recipe.canvas == SMALL else 1))
    record = {
        "recipe": asdict(recipe),
        "minutes_per_stage": minutes,
        "held_out_accuracy": accuracy,
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print_json(data=accuracy)


def _run_stage(
    name: str, steps: Iterator[str | None], count: int, model: LlavaForConditionalGeneration, folder: Path
) -> None:
    """Drive a stage under a progress bar; the weights are saved to ``folder`` at every report."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=count)
        for step, line in enumerate(steps, start=1):
            progress.advance(task)
            if line:
                progress.console.log(f"{name} {step}: {line}")
                model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--canvas", choices=RECIPES, default=SMALL.name)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--resume", action="store_true", help="skip the stages already finished under --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, replace(RECIPES[options.canvas], seed=options.seed), options.resume)


if __name__ == "__main__":
    main()
