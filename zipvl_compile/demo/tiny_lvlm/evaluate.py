"""Questions on held-out digits, and how many of them a checkpoint answers rightly with ``generate``."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from zipvl_compile.demo.tiny_lvlm.canvas import SMALL, Canvas
from zipvl_compile.demo.tiny_lvlm.questions import IMAGE as IMAGE_TOKEN
from zipvl_compile.demo.tiny_lvlm.questions import KINDS, MULTI_TOKEN_KINDS, SINGLE_TOKEN_KINDS, ask
from zipvl_compile.demo.tiny_lvlm.scenes import draw_scene


class DemoQuestion(NamedTuple):
    """A picture, the text for the processor, the right answer as words, the kind of the question, and where to look.

    ``cells``: row and column of every digit, in cells of the canvas.
    """

    image: Image.Image
    prompt: str
    answer: str
    kind: str
    cells: tuple[tuple[int, int], ...] = ()


def questions_for_demo(
    count: int, seed: int, kinds: Iterable[str] = KINDS, canvas: Canvas = SMALL
) -> Iterator[DemoQuestion]:
    """Yield ``count`` questions, the kinds in turn, every one about its own scene of held-out digits."""
    rng = np.random.default_rng(seed)
    for kind in islice(cycle(tuple(kinds)), count):
        scene = draw_scene(rng, "held_out", canvas=canvas)
        question = ask(rng, scene.digits, kind)
        yield DemoQuestion(
            Image.fromarray(scene.image),
            f"{IMAGE_TOKEN} {question.prompt}",
            question.answer,
            question.kind,
            tuple((one.row, one.column) for one in scene.digits),
        )


def exact_match(generated: str, expected: str) -> bool:
    """Whether two answers are the same words, whatever the blanks between them."""
    return generated.split() == expected.split()


@torch.no_grad()
def generate_answers(model, processor, questions: Iterable[DemoQuestion], batch_size: int = 32) -> list[str]:
    """Greedy answers, decoded to words, in the order of the questions."""
    answers: list[str] = []
    questions = list(questions)
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        inputs = processor(
            images=[question.image for question in chunk],
            text=[question.prompt for question in chunk],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def accuracy_per_kind(model, processor, questions: Iterable[DemoQuestion], batch_size: int = 32) -> dict[str, float]:
    """Share of exactly right answers for every kind that occurs."""
    questions = list(questions)
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, generate_answers(model, processor, questions, batch_size), strict=True):
        right[question.kind].append(exact_match(answer, question.answer))
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def summary(per_kind: dict[str, float]) -> dict[str, float]:
    """The rates per kind with the means over the single-token and the multi-token kinds."""
    groups = {"single_token": SINGLE_TOKEN_KINDS, "multi_token": MULTI_TOKEN_KINDS}
    means = {name: float(np.mean([per_kind[kind] for kind in kinds])) for name, kinds in groups.items()}
    return {name: round(rate, 4) for name, rate in (per_kind | means).items()}
