"""Questions about pictures: right answers by kind and length of the answer, and what the prefill took.

The bundled LVLM answers held-out questions of every kind; any other model those of a file, a line of JSON each:

    {"image": "street.jpg", "question": "What does the sign say?", "answer": "stop"}

The baseline "picture x 0.63" is the dense model with a smaller picture, of 0.4 of the pixels. It only is one where the
processor makes fewer tokens of it. That of the bundled LVLM scales every picture to its grid of 16 x 16 cells, so there
the row is left out: a picture scaled down and up again costs as many bytes as before.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from zipvl_compile.demo.compare import answer
from zipvl_compile.demo.prompts import prompt_inputs, read_image
from zipvl_compile.demo.tiny_lvlm.evaluate import DemoQuestion, exact_match, questions_for_demo
from zipvl_compile.evaluate.compiled import Compiled
from zipvl_compile.evaluate.flops import CountedFlops
from zipvl_compile.evaluate.measures import Item
from zipvl_compile.evaluate.variants import PICTURE_SCALE, Options

SEEDS = {"report": 1, "choose": 2}
MAX_NEW_TOKENS = 16


class PictureTask:
    """One LVLM and its questions; `run` measures one variant.

    Attributes:
        case: what was measured, for the results.
        count: of questions.
    """

    def __init__(self, name: str, model: Any, processor: Any, questions: Sequence[DemoQuestion], what: str):
        self.model, self.processor, self.questions = model, processor, list(questions)
        self._compiled = Compiled(model)
        self.count = len(self.questions)
        self.case = f"{name}, {self.count} {what}"
        self._dense: list[str] = []
        tokenizer = getattr(processor, "tokenizer", processor)
        self._lengths = [len(tokenizer(q.answer, add_special_tokens=False)["input_ids"]) for q in self.questions]

    def takes(self, options: Options) -> bool:
        """Return whether a variant can be run: a smaller picture must become fewer tokens."""
        if PICTURE_SCALE not in options:
            return True
        one = self.questions[0]
        lengths = [self._inputs(one, scale)["input_ids"].shape[1] for scale in (1.0, options[PICTURE_SCALE])]
        return lengths[1] < lengths[0]

    @torch.no_grad()
    def run(self, options: Options, advance: Callable[[], None] = lambda: None) -> list[Item]:
        """Return what each question gave.

        Args:
            options: of the backend, or `PICTURE_SCALE`; none are the dense model, which comes first.
            advance: called after each question.
        """
        scale = options.get(PICTURE_SCALE, 1.0)
        of_backend = {key: options[key] for key in options if key != PICTURE_SCALE}
        prompts = [self._inputs(question, scale) for question in self.questions]
        with self._compiled.as_variant(of_backend) as (model, new):
            if new:
                answer(model, self.processor, prompts[0], 1)
            items = self._ask(model, prompts, scale, advance)
        answers = [item["answer"] for item in items]
        if not options:
            self._dense = answers
        for item, text, dense in zip(items, answers, self._dense, strict=True):
            item["agreement"] = float(text == dense)
        return items

    def _ask(self, model: Any, prompts: list[Any], scale: float, advance: Callable[[], None]) -> list[Item]:
        items = []
        for question, prompt, length in zip(self.questions, prompts, self._lengths, strict=True):
            with CountedFlops() as counted:
                first = answer(model, self.processor, prompt, 1)
            text = answer(model, self.processor, prompt, MAX_NEW_TOKENS).text
            whole = self._inputs(question, 1.0)["input_ids"].shape[1] if scale < 1 else first.prompt_length
            kept = [len(positions) / whole for positions in first.kept if positions is not None]
            items.append({
                "item": question.prompt,
                "groups": (question.kind, "single_token" if length == 1 else "multi_token"),
                "answer": text,
                "accuracy": float(is_right(text, question.answer)),
                "kept": sum(kept) / len(kept) if kept else 1.0,
                "kv_bytes": first.kv_used,
                "kv_bytes_allocated": first.kv_allocated,
                "prefill_flops": counted.total,
            })  # fmt: skip
            advance()
        return items

    def _inputs(self, question: DemoQuestion, scale: float) -> dict[str, torch.Tensor]:
        picture = question.image
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        return prompt_inputs(self.processor, picture, question.prompt, self.model.device)


def is_right(given: str, expected: str) -> bool:
    """Return whether two answers are the same words, whatever their case and a full stop at the end."""
    return exact_match(*(text.lower().rstrip(" .") for text in (given, expected)))


def grouped(items: Sequence[Item]) -> dict[str, list[int]]:
    """Return the indices of the items of each group, as "read_all" or "multi_token"; a group of all is left out."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        for group in item.get("groups", ()):
            found[group].append(index)
    return {group: indices for group, indices in found.items() if len(indices) < len(items)}


def bundled_questions(count: int, split: str) -> list[DemoQuestion]:
    """Return held-out questions of every kind in turn, other ones for each split."""
    return list(questions_for_demo(count, SEEDS[split]))


def read_questions(path: Path, count: int | None = None) -> list[DemoQuestion]:
    """Read `{"image": path, "question": ..., "answer": ...}` from a file of JSON lines.

    Args:
        path: of the file; images are named relative to its folder.
        count: of lines, from the first; None reads all.

    Raises:
        ValueError: no such file, or a line of another form.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    except OSError as error:
        raise ValueError(f"--data: expected a file, got {str(path)!r} ({error.strerror}). Check the path.") from error
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            image, question, expected = (row[key] for key in ("image", "question", "answer"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'--data: expected {{"image": path, "question": text, "answer": text}} in line {number} of {path}, '
                f"got {line[:80]!r} ({error!r}). Correct the line."
            ) from error
        questions.append(DemoQuestion(read_image(path.parent / image), question, str(expected), row.get("kind", "all")))
    if not questions:
        raise ValueError(f"--data: expected at least one line, got none in {str(path)!r}. Add questions.")
    return questions
