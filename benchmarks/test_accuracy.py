"""Accuracy of the bundled LVLM on held-out questions, dense and with zipvl.

    make bench        appends to benchmarks/results/tiny_lvlm.jsonl

Every variant answers the same questions, one prompt at a time. At equal numbers of kept tokens a fixed ratio keeps the
same share in every layer and prompt, where `tau` chooses.
"""

from __future__ import annotations

import copy

import pytest
import torch
from harness import report

from zipvl_compile.demo.compare import answer
from zipvl_compile.demo.prompts import load, prompt_inputs
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.evaluate import exact_match, questions_for_demo

QUESTIONS = 500
VARIANTS = {
    "dense": None,
    "tau 0.975": {"tau": 0.975},
    "tau 0.9": {"tau": 0.9},
    "tau 0.8": {"tau": 0.8},
    "tau 0.9, queries all": {"tau": 0.9, "unselected": "all"},
    "tau 0.8, queries all": {"tau": 0.8, "unselected": "all"},
    "keep_ratio 0.5": {"keep_ratio": 0.5},
}


@pytest.fixture(scope="module")
def asked():
    """Return the model and processor, and the questions with their inputs."""
    model, processor = load(str(CHECKPOINT), "cpu")
    questions = list(questions_for_demo(QUESTIONS, seed=1))
    return model, processor, [(q, prompt_inputs(processor, q.image, q.prompt)) for q in questions]


@pytest.fixture(scope="module")
def dense_answers(asked):
    model, processor, questions = asked
    return [answer(model, processor, inputs, 8) for _, inputs in questions]


@pytest.mark.benchmark(group="accuracy")
@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy(asked, dense_answers, benchmark, variant):
    model, processor, questions = asked
    options = VARIANTS[variant]
    torch._dynamo.reset()
    if options is not None:
        model = copy.deepcopy(model)
        model.compile(backend="zipvl", options=options | {"min_tokens": 0, "inner": "eager"}, dynamic=True)
    answers = [answer(model, processor, inputs, 8) for _, inputs in questions] if options else dense_answers
    benchmark.pedantic(answer, args=(model, processor, questions[0][1], 8), rounds=3)

    def accuracy(given):
        return sum(exact_match(a.text, q.answer) for a, (q, _) in zip(given, questions, strict=True)) / len(questions)

    kept = [len(positions) / a.prompt_length for a in answers for positions in a.kept if positions is not None]
    report("tiny_lvlm", "tiny_lvlm", f"{QUESTIONS} held-out questions, one at a time", variant,
           accuracy=(accuracy(answers), "fraction"),
           accuracy_minus_dense_points=(100 * (accuracy(answers) - accuracy(dense_answers)), "points"),
           agreement=(sum(a.text == b.text for a, b in zip(answers, dense_answers, strict=True)) / len(answers),
                      "fraction"),
           kept=(sum(kept) / len(kept), "fraction"))  # fmt: skip
