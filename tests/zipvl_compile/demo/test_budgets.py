"""Answers at smaller budgets: each prompt keeps what is asked for, chosen or drawn."""

import pytest
import torch

pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from zipvl_compile.demo import budgets as module
from zipvl_compile.demo.budgets import BUDGETS, at_budgets, random_tokens
from zipvl_compile.demo.compare import answer, compiled_copy
from zipvl_compile.demo.prompts import load, prompt_inputs
from zipvl_compile.demo.tiny_lvlm.evaluate import questions_for_demo


def test_every_budget_is_kept_and_right_answers_are_counted(folder, monkeypatch):
    kept = []

    def counted(model, processor, inputs, most):
        found = answer(model, processor, inputs, most)
        kept.append((found.prompt_length, list(found.kept)))
        return found

    monkeypatch.setattr(module, "answer", counted)
    monkeypatch.setattr(module, "exact_match", lambda text, expected: expected == "yes")
    model, processor = load(str(folder), "cpu")
    asked = [
        question._replace(answer=word) for question, word in zip(questions_for_demo(2, 0), ("yes", "no"), strict=True)
    ]
    prompts = [prompt_inputs(processor, question.image, question.prompt) for question in asked]
    chooses = compiled_copy(model, {"min_tokens": 0}, "eager", dynamic=True)
    advanced = []
    found = at_budgets(chooses, random_tokens(model), processor, asked, prompts, 2, lambda: advanced.append(1))
    assert [row.share for row in found] == list(BUDGETS) and len(advanced) == len(kept) == 4 * len(BUDGETS)
    assert all(row.chosen == row.drawn == [True, False] for row in found)
    for i, (n, layers) in enumerate(kept):
        expected = -(-n * BUDGETS[i // 4] // 1)
        assert {len(positions) for positions in layers} == {int(expected)}
    chosen, drawn = kept[0][1], kept[2][1]
    assert not torch.equal(chosen[0], drawn[0])
    assert all(torch.equal(positions, drawn[0]) for positions in drawn), "the same random tokens in every layer"
