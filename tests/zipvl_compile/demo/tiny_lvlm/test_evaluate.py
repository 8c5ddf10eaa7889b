"""Questions on held-out digits, and how they are marked."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.evaluate import (
    accuracy_per_kind,
    exact_match,
    generate_answers,
    questions_for_demo,
    summary,
)
from zipvl_compile.demo.tiny_lvlm.questions import KINDS, MULTI_TOKEN_KINDS, SINGLE_TOKEN_KINDS


def test_padded_batch_answers_as_single_prompts_do(model, processor):
    questions = list(questions_for_demo(2 * len(KINDS), seed=11))
    padded = processor(
        images=[question.image for question in questions],
        text=[question.prompt for question in questions],
        padding=True,
        return_tensors="pt",
    )
    assert padded["attention_mask"].min() == 0 and padded["attention_mask"][:, -1].all()
    together = generate_answers(model, processor, questions, batch_size=len(questions))
    assert together == generate_answers(model, processor, questions, batch_size=1)


@pytest.mark.parametrize(
    ("kinds", "count", "floor"), [(SINGLE_TOKEN_KINDS, 161, 0.9), (MULTI_TOKEN_KINDS, 40, 0.7)], ids=["single", "multi"]
)
def test_accuracy_on_held_out_digits(model, processor, kinds, count, floor):
    rates = accuracy_per_kind(model, processor, questions_for_demo(count, seed=2024, kinds=kinds))
    assert np.mean(list(rates.values())) >= floor, rates


def test_exact_match_ignores_only_blanks():
    assert exact_match(" 1 2  3", "1 2 3")
    assert not exact_match("1 2 3 4", "1 2 3")
    assert not exact_match("12 3", "1 2 3")


def test_a_summary_has_the_means_of_both_groups():
    rates = dict.fromkeys(SINGLE_TOKEN_KINDS, 0.5) | dict.fromkeys(MULTI_TOKEN_KINDS, 0.25)
    assert summary(rates) == rates | {"single_token": 0.5, "multi_token": 0.25}
