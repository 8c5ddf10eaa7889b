"""The questions: answers that follow from the scene."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES, SMALL
from zipvl_compile.demo.tiny_lvlm.questions import (
    COUNT_WORDS,
    KINDS,
    SINGLE_TOKEN_KINDS,
    Question,
    ask,
    hints,
    vocabulary,
)
from zipvl_compile.demo.tiny_lvlm.scenes import PlacedDigit, draw_scene


def true_answer(prompt: str, digits: tuple[PlacedDigit, ...]) -> str:
    """Answer a prompt by reading its words, independently of the code that wrote it."""
    words = prompt.split()
    by_colour = {one.colour: one for one in digits}
    match words:
        case ["what", "digit", "is", "at", row, column, "?"]:
            return next(str(one.digit) for one in digits if (f"r{one.row + 1}", f"c{one.column + 1}") == (row, column))
        case ["what", "digit", "is", colour, "?"]:
            return str(by_colour[colour].digit)
        case ["what", "color", "is", digit, "?"]:
            (only,) = [one.colour for one in digits if str(one.digit) == digit]
            return only
        case ["which", "row", "is", colour, "in", "?"]:
            return f"r{by_colour[colour].row + 1}"
        case ["which", "column", "is", colour, "in", "?"]:
            return f"c{by_colour[colour].column + 1}"
        case ["how", "many", "digits", "are", "there", "?"]:
            return COUNT_WORDS[len(digits)]
        case ["how", "many", digit, "are", "there", "?"]:
            return COUNT_WORDS[Counter(str(one.digit) for one in digits)[digit]]
        case ["read", "all", "digits", ":"]:
            return " ".join(str(one.digit) for one in sorted(digits, key=lambda one: (one.row, one.column)))
        case ["read", *colours, ":"]:
            return " ".join(str(by_colour[colour].digit) for colour in colours)
    raise AssertionError(f"unknown prompt: {prompt}")


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_scene(kind, canvas):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(200 if canvas == SMALL else 5):
        digits = draw_scene(rng, "held_out", canvas=canvas).digits
        question = ask(rng, digits, kind)
        assert question.kind == kind or kind == "digit_to_colour"
        assert question.answer == true_answer(question.prompt, digits)
        assert set(f"{question.prompt} {question.answer}".split()) <= set(vocabulary(canvas))
        if kind in SINGLE_TOKEN_KINDS:
            assert len(question.answer.split()) == 1


def test_digit_to_colour_falls_back_when_no_digit_is_unique():
    digits = (PlacedDigit(0, 0, 5, "red"), PlacedDigit(1, 1, 5, "blue"))
    question = ask(np.random.default_rng(0), digits, "digit_to_colour")
    assert question.kind == "colour_to_digit" and question.answer == "5"


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "expected"),
    [
        ("colour_to_digit", "what digit is red ?", "7", {3: "7"}),
        ("position_to_digit", "what digit is at r3 c5 ?", "7", {5: "7"}),
        ("count_digit", "how many 7 are there ?", "two", {2: "two"}),
        ("read_colours", "read red blue green :", "1 2 3", {1: "1", 2: "2", 3: "3"}),
        ("read_all", "read all digits :", "1 2 3", {}),
        ("count_all", "how many digits are there ?", "three", {}),
    ],
)
def test_hints_sit_on_the_words_that_the_answer_turns_on(kind, prompt, answer, expected):
    assert hints(Question(kind, prompt, answer)) == expected


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
def test_vocabulary_has_no_duplicates(canvas):
    assert len(set(vocabulary(canvas))) == len(vocabulary(canvas))
    assert len(canvas.rows) == len(canvas.columns) == canvas.grid
