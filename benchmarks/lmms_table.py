"""Accuracy and cost by lmms-eval, of its model and of zipvl: writes results/lmms.md; `make test-lmms` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zipvl_compile.evaluate.results import environment

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("ZIPVL_RESULTS", ROOT / "benchmarks/results"))
FOLDER = ROOT / "build/lmms/tables"
#: Model, tasks and, by name, what follows `pretrained=` in --model_args.
RUNS = {
    "small": (
        "digits,digits_choice",
        {
            "as lmms-eval runs it": "backend=none",
            "Inductor": "backend=inductor",
            "zipvl, every token": "tau=1,min_tokens=0",
            "zipvl, quality": "min_tokens=0",
            "zipvl, balanced": "preset=balanced,min_tokens=0",
        },
    ),
    "large": (
        "digits",
        {
            "as lmms-eval runs it": "backend=none",
            "Inductor": "backend=inductor",
            "zipvl, by default": "",
            "zipvl, balanced": "preset=balanced",
        },
    ),
}
#: Task -> what its requests are, and its metric.
TASKS = {"digits": ("generate_until", "exact_match"), "digits_choice": ("loglikelihood", "acc")}


def evaluate(model: str, tasks: str, arguments: str) -> dict[str, Any]:
    """Run `lmms-eval` and return what it wrote into its results file."""
    folder, output = FOLDER / model, FOLDER / model / "output"
    known = set(output.rglob("*_results.json"))
    args = ",".join([f"pretrained={folder / 'model'}", *filter(None, [arguments])])
    command = [
        str(Path(sys.executable).with_name("lmms-eval")), "--model", "zipvl", "--model_args", args, "--tasks", tasks,
        "--include_path", str(folder / "tasks"), "--output_path", str(output), "--log_samples", "--force_simple",
        "--device", "cpu", "--batch_size", "1",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=FOLDER, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (new,) = set(output.rglob("*_results.json")) - known
    return json.loads(new.read_text())


def row(model: str, task: str, name: str, results: dict[str, Any]) -> str:
    """Return the line of the table for one task."""
    kind, metric = TASKS[task]
    of = {key: value for key, value in results["throughput"].items() if key.startswith(f"avg_zipvl_{kind}_")}
    of = {key.removeprefix(f"avg_zipvl_{kind}_"): value for key, value in of.items()}
    scores = results["results"][task]
    decode = f"{of['decode_ms']:.1f} ms" if "decode_ms" in of else ""
    cells = [
        f"{of['prompt_tokens']:,.0f}", task, name,
        f"{scores[f'{metric},none']:.1%} ± {scores[f'{metric}_stderr,none']:.1%}",
        f"{of['prefill_ms']:,.0f} ms", decode, f"{of['kept']:.0%}",
        f"{of['kv_bytes'] / 1e6:.2f} MB", f"{of['kv_bytes'] / of['kv_bytes_dense']:.0%}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Evaluate everything and write the table."""
    lines = [
        "| prompt tokens | task | | score | to the first token | each further one | kept | KV cache | of dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, (tasks, variants) in RUNS.items():
        maker = [sys.executable, str(ROOT / "tests/support/lmms_task.py"), str(FOLDER / model), model]
        subprocess.run(maker, check=True)
        for name, arguments in variants.items():
            results = evaluate(model, tasks, arguments)
            lines += [row(model, task, name, results) for task in tasks.split(",")]
    about = environment(ROOT)
    count = "45 questions with a small picture, 16 with answers to choose from, 27 with a large picture"
    head = (
        "# By lmms-eval\n\n"
        "The bundled models, asked about handwritten digits they were not trained on, by lmms-eval's own loop and its "
        "`llava_hf`: [how](../../docs/evaluation.md). Written by `make test-lmms`. Times are medians over requests, "
        "tokens and bytes are means. Prompts of 263 tokens are too short to gain time: there, options are told to "
        "compact all prompts. A request of `digits_choice` is one call of the model.\n"
    )
    foot = (
        f"{count}. {about['hardware']}, load average {os.getloadavg()[2]:.1f}; "
        f"lmms-eval {version('lmms-eval')}, torch {about['torch']}, transformers "
        f"{about['transformers']}; {about['date']}, commit {about['commit']}.\n"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "lmms.md").write_text("\n".join([head, *lines, "", foot]))


if __name__ == "__main__":
    main()
