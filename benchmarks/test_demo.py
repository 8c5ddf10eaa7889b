"""What `make demo` shows, on more questions: the bundled LVLM on pictures of 9,216 image tokens, by `generate`.

    make bench        appends to benchmarks/results/demo.jsonl and draws benchmarks/results/demo.png

Dense (Inductor) and zipvl with default options answer the same held-out questions in turns; times are medians.
"""

from __future__ import annotations

from statistics import mean

import pytest
from harness import RESULTS, report
from rich.console import Console

from zipvl_compile.demo.bundled import Bundled, ask_bundled
from zipvl_compile.demo.compare import medians
from zipvl_compile.demo.side_by_side import Setup

QUESTIONS, SEED = 54, 7  # other questions than those of the demo


@pytest.mark.benchmark(group="demo")
def test_the_bundled_model_by_generate(benchmark):
    asked = (Console(width=80), Setup(output=RESULTS / "demo.png"), QUESTIONS, SEED)
    found = benchmark.pedantic(ask_bundled, asked, rounds=1)
    for name in found.result.answers:
        report("demo", "generate", _case(found), name, **_row(found, name))
    for row in found.budgets:
        for name, right in (("chosen", row.chosen), ("random", row.drawn)):
            metrics = {"right": (mean(right), "fraction"), "questions": (len(right), "answers")}
            report("demo", "budget", _case(found), f"{name} {row.share}", **metrics)


def _case(found: Bundled) -> str:
    return f"the bundled LVLM of {found.result.dense[0].prompt_length} tokens, {len(found.result.dense)} questions"


def _row(found: Bundled, name: str) -> dict[str, tuple[float, str]]:
    answers, dense = found.result.answers[name], found.result.dense
    first, later = medians(answers)
    kept = [sum(p.numel() for p in a.kept if p is not None) / len(a.kept) / a.prompt_length for a in answers]
    same = [a.text == b.text for a, b in zip(answers, dense, strict=True)]
    return {
        "prefill": (first * 1e3, "ms"),
        "decode": ((later or 0.0) * 1e3, "ms"),
        "kv_bytes": (mean(a.kv_allocated for a in answers), "bytes"),
        "kept": (mean(kept), "fraction"),
        "right": (mean(found.right[name]), "fraction"),
        "same": (mean(same), "fraction"),
    }
