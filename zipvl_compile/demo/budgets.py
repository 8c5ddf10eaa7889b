"""How few tokens a prompt needs: right answers at given budgets, beside those with as many tokens drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zipvl_compile.demo.compare import Inputs, answer, compiled_copy
from zipvl_compile.demo.tiny_lvlm.evaluate import DemoQuestion, exact_match
from zipvl_compile.per_request import settings

#: Fractions of the prompt's tokens.
BUDGETS = (0.1, 0.03, 0.01)
#: The default's rule with other tokens: what differs is which ones are kept.
RANDOM = {"policy": "union", "score": "random", "min_tokens": 0}


@dataclass(frozen=True)
class Budgeted:
    """What a number of kept tokens is enough for.

    Attributes:
        share: of the prompt's tokens that each layer keeps.
        chosen: whether each question was answered rightly with the tokens that the layers chose.
        drawn: the same with random ones.
    """

    share: float
    chosen: list[bool]
    drawn: list[bool]


def random_tokens(model: Any) -> Any:
    """Return a compiled copy of a model that keeps random tokens; it is not timed, so Inductor is not waited for."""
    return compiled_copy(model, {**RANDOM, "keep_ratio": BUDGETS[0]}, "eager", dynamic=True)


def at_budgets(
    chooses: Any,
    draws: Any,
    processor: Any,
    asked: Sequence[DemoQuestion],
    prompts: Sequence[Inputs],
    max_new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Budgeted]:
    """Answer questions at every budget of `BUDGETS`; nothing compiles anew.

    Args:
        chooses: a model compiled by zipvl.
        draws: that of `random_tokens`.
        processor: of both.
        asked: the questions.
        prompts: their inputs.
        max_new_tokens: of an answer.
        advance: called after each answer.
    """

    def right(model: Any, share: float) -> list[bool]:
        found = []
        for question, prompt in zip(asked, prompts, strict=True):
            with settings(keep_ratio=share):
                text = answer(model, processor, prompt, max_new_tokens).text
            found.append(exact_match(text, question.answer))
            advance()
        return found

    return [Budgeted(share, right(chooses, share), right(draws, share)) for share in BUDGETS]
