"""Answers where several rows of the prompt are read at once: assisted and lookup decoding, and the scoring of answers.

    make bench        appends to benchmarks/results/answering_rows.jsonl

The first forward of assisted decoding carries prompt and draft: a row that attended has to judge every draft token.
With dense attention all ways of decoding give the answers of greedy decoding. Scoring picks the candidate of the
highest log-likelihood, read from the rows of its tokens.
"""

from __future__ import annotations

import copy

import pytest
import torch
from harness import report

from zipvl_compile.demo.prompts import load, prompt_inputs
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.evaluate import exact_match, questions_for_demo

QUESTIONS = 160
NOISE = 0.3  # of the draft's weights, relative to their spread: it is often wrong
OPTIONS = {"policy": "paper", "tau": 0.975, "min_tokens": 0, "inner": "eager"}


@pytest.fixture(scope="module")
def asked():
    """Return the model and processor, a draft model that is often wrong, and the questions with their inputs."""
    model, processor = load(str(CHECKPOINT), "cpu")
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in draft.model.language_model.parameters():
            weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    questions = list(questions_for_demo(QUESTIONS, seed=1))
    return model, processor, draft, [(q, prompt_inputs(processor, q.image, q.prompt)) for q in questions]


def decoded(model, processor, inputs, **how):
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, **how)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def best_scored(model, processor, inputs, candidates):
    """Return the candidate of the highest log-likelihood, each appended to the prompt."""

    def score(candidate):
        words = processor.tokenizer(candidate, add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([inputs["input_ids"], words], 1)
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(input_ids=ids, logits_to_keep=words.shape[1] + 1, use_cache=True, **rest).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, words[..., None]).sum().item()

    return max(candidates, key=score)


def answers(way, model, processor, draft, questions):
    if way == "scoring":
        by_kind: dict[str, set[str]] = {}
        for q, _ in questions:
            by_kind.setdefault(q.kind, set()).add(q.answer)
        return [best_scored(model, processor, x, sorted(by_kind[q.kind])) for q, x in questions]
    how = {
        "greedy": {},
        "assisted, bad draft": {"assistant_model": draft},
        "lookup": {"prompt_lookup_num_tokens": 4},
    }[way]
    return [decoded(model, processor, x, **how) for _, x in questions]


@pytest.mark.benchmark(group="answers read from several rows")
@pytest.mark.parametrize("backend", ["dense", "zipvl"])
@pytest.mark.parametrize("way", ["greedy", "assisted, bad draft", "lookup", "scoring"])
def test_answering_rows(asked, benchmark, way, backend):
    model, processor, draft, questions = asked
    torch._dynamo.reset()
    if backend == "zipvl":
        model = copy.deepcopy(model)
        model.compile(backend="zipvl", options=OPTIONS, dynamic=True)
    given = benchmark.pedantic(answers, args=(way, model, processor, draft, questions))
    right = sum(exact_match(a, q.answer) for a, (q, _) in zip(given, questions, strict=True)) / len(questions)
    case = f"{QUESTIONS} held-out questions, one at a time"
    report("answering_rows", way, case, backend, accuracy=(right, "fraction"))
