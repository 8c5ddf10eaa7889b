"""Questions about a scene: their wording, their answers, and the vocabulary both are written in."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zipvl_compile.demo.tiny_lvlm.canvas import LARGE, Canvas
from zipvl_compile.demo.tiny_lvlm.scenes import COLOUR_NAMES, PlacedDigit

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, IMAGE)

DIGIT_WORDS = tuple(str(digit) for digit in range(10))
COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
# Says "there is no digit on this patch" while the vision tower is aligned with the words; never an answer.
NOTHING = "nothing"
_PROSE = tuple(
    "what which how many digit digits color row column is are in at there read all ? :".split()  # noqa: SIM905
)
_TURNING_WORDS = frozenset((*DIGIT_WORDS, *COLOUR_NAMES, *LARGE.rows, *LARGE.columns))

Digits = Sequence[PlacedDigit]


@dataclass(frozen=True)
class Question:
    """``prompt`` and ``answer`` are words separated by blanks, without ``<image>`` and ``<eos>``."""

    kind: str
    prompt: str
    answer: str


def vocabulary(canvas: Canvas) -> tuple[str, ...]:
    """The words that pictures of a canvas are asked about in; the first ones are the same for all."""
    return (
        *SPECIAL_TOKENS,
        *_PROSE,
        *DIGIT_WORDS,
        *COLOUR_NAMES,
        *canvas.rows,
        *canvas.columns,
        *COUNT_WORDS,
        NOTHING,
    )


def ask(rng: np.random.Generator, digits: Digits, kind: str) -> Question:
    """Draw a question of the given kind about the digits of one scene (in reading order).

    A scene in which no digit is unique has no "what color is 7 ?"; ``ask`` then draws a
    "what digit is red ?".
    """
    drawn = _DRAW[kind](rng, digits)
    if drawn is None:
        kind, drawn = "colour_to_digit", _colour_to_digit(rng, digits)
    return Question(kind, *drawn)


def hints(question: Question) -> dict[int, str]:
    """Answer words that can be known before the prompt ends: index of the prompt word -> answer word.

    "what digit is red ?" can be answered from "red" on, and "read red blue green :" word by word.
    """
    words = question.prompt.split()
    turning = [index for index, word in enumerate(words) if word in _TURNING_WORDS]
    answers = question.answer.split()
    if question.kind in SINGLE_TOKEN_KINDS:
        turning = turning[-1:]
    return dict(zip(turning, answers, strict=True)) if len(turning) == len(answers) else {}


def _any(rng: np.random.Generator, digits: Digits) -> PlacedDigit:
    return digits[int(rng.integers(len(digits)))]


def _colour_to_digit(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    one = _any(rng, digits)
    return f"what digit is {one.colour} ?", str(one.digit)


def _digit_to_colour(rng: np.random.Generator, digits: Digits) -> tuple[str, str] | None:
    counts = Counter(one.digit for one in digits)
    unique = [one for one in digits if counts[one.digit] == 1]
    if not unique:
        return None
    one = _any(rng, unique)
    return f"what color is {one.digit} ?", one.colour


def _colour_to_row(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    one = _any(rng, digits)
    return f"which row is {one.colour} in ?", LARGE.rows[one.row]


def _colour_to_column(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    one = _any(rng, digits)
    return f"which column is {one.colour} in ?", LARGE.columns[one.column]


def _position_to_digit(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    one = _any(rng, digits)
    return f"what digit is at {LARGE.rows[one.row]} {LARGE.columns[one.column]} ?", str(one.digit)


def _count_all(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    return "how many digits are there ?", COUNT_WORDS[len(digits)]


def _count_digit(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    # Mostly digits that are there: "zero" would be the answer nearly always otherwise.
    digit = _any(rng, digits).digit if rng.random() < 0.75 else int(rng.integers(10))
    return f"how many {digit} are there ?", COUNT_WORDS[sum(one.digit == digit for one in digits)]


def _read_all(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    return "read all digits :", " ".join(str(one.digit) for one in digits)


def _read_colours(rng: np.random.Generator, digits: Digits) -> tuple[str, str]:
    chosen = [digits[int(index)] for index in rng.permutation(len(digits))[:3]]
    colours, answers = (
        " ".join(words) for words in zip(*((one.colour, str(one.digit)) for one in chosen), strict=True)
    )
    return f"read {colours} :", answers


_DRAW: dict[str, Callable[[np.random.Generator, Digits], tuple[str, str] | None]] = {
    "colour_to_digit": _colour_to_digit,
    "digit_to_colour": _digit_to_colour,
    "colour_to_row": _colour_to_row,
    "colour_to_column": _colour_to_column,
    "position_to_digit": _position_to_digit,
    "count_all": _count_all,
    "count_digit": _count_digit,
    "read_all": _read_all,
    "read_colours": _read_colours,
}
KINDS = tuple(_DRAW)
MULTI_TOKEN_KINDS = ("read_all", "read_colours")
SINGLE_TOKEN_KINDS = tuple(kind for kind in KINDS if kind not in MULTI_TOKEN_KINDS)
