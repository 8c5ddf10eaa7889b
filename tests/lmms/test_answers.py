"""`--model zipvl` in lmms-eval's own loop: where every token is kept, answers and losses are those of the base."""

from __future__ import annotations

import pytest

pytest.importorskip("lmms_eval")

import torch
from support.lmms_task import CHOICES
from transformers import AutoModelForImageTextToText, AutoProcessor

from zipvl_compile.demo.tiny_lvlm.evaluate import generate_answers, questions_for_demo

EAGER = "inner=eager,min_tokens=0"
EVERY = f"tau=1,{EAGER}"


def answers(results, task="digits"):
    return [one["filtered_resps"] for one in results["samples"][task]]


def took(results, task="digits"):
    return [counts for one in results["samples"][task] for counts in one["token_counts"]]


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_answers_are_those_of_the_base(evaluate, model, simple):
    base = evaluate("llava_hf", f"pretrained={model},device_map=cpu", "digits", simple=simple)
    every = evaluate("zipvl", f"pretrained={model},{EVERY}", "digits", simple=simple)
    assert answers(every) == answers(base) and every["results"] == base["results"]
    score = base["results"]["digits"]["exact_match,none"]
    assert 0.6 < score <= 1, "the model answers; else equal answers say little"


def test_answers_are_those_without_lmms_eval(evaluate, model):
    f, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    plain = generate_answers(f, processor, questions_for_demo(18, 0))
    every = evaluate("zipvl", f"pretrained={model},{EVERY}", "digits")
    assert [one[0] for one in answers(every)] == plain


@pytest.fixture(scope="module")
def weighed(model):
    """The loss of every answer to every question of `digits_choice`, and how many of the best are right.

    By the model itself, without any code of lmms-eval or zipvl.
    """
    f, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    found, right = [], []
    for question in questions_for_demo(4, 1, kinds=CHOICES):
        first = len(found)
        for choice in CHOICES[question.kind]:
            x = processor(text=f"{question.prompt} {choice}", images=question.image, return_tensors="pt")
            with torch.no_grad():
                row = f(**x).logits[0, -2]  # the answer is one word, which the row before it predicts
            found.append(-torch.log_softmax(row, 0)[x["input_ids"][0, -1]].item())
        best = min(range(first, len(found)), key=found.__getitem__) - first
        right.append(CHOICES[question.kind][best] == question.answer)
    return found, sum(right) / len(right)


@pytest.mark.parametrize("args", ["backend=none", EVERY], ids=["base", "zipvl"])
def test_losses_are_those_of_the_answers(evaluate, model, weighed, args):
    results = evaluate("zipvl", f"pretrained={model},{args}", "digits_choice", simple=True)
    got = [float(loss) for one in answers(results, "digits_choice") for loss, _ in one]
    losses, accuracy = weighed
    torch.testing.assert_close(got, losses, rtol=1e-4, atol=1e-4)
    assert results["results"]["digits_choice"]["acc,none"] == accuracy


def test_losses_of_fewer_tokens_differ_a_little(evaluate, model, weighed):
    results = evaluate("zipvl", f"pretrained={model},preset=balanced,{EAGER}", "digits_choice", simple=True)
    got = [float(loss) for one in answers(results, "digits_choice") for loss, _ in one]
    differ = [abs(a - b) for a, b in zip(got, weighed[0], strict=True)]
    assert max(differ) > 1e-3 and sum(differ) / len(differ) < 1
    assert all(0.3 < one["kept"] < 0.95 for one in took(results, "digits_choice"))


def test_every_sample_says_what_it_took(evaluate, model):
    results = evaluate("zipvl", f"pretrained={model},keep_ratio=0.5,{EAGER}", "digits")
    per_token = 4 * 2 * 2 * 32 * 4  # 4 layers, K and V, 2 heads of 32, fp32
    for one, answer in zip(took(results), answers(results), strict=True):
        n, new = one["prompt_tokens"], one["output_tokens"]
        assert n > 256 and 0.5 <= one["kept"] < 0.51 and new == len(answer[0].split()) + 1
        assert one["kv_bytes_dense"] == per_token * (n + new - 1)
        assert one["kv_bytes"] == pytest.approx(per_token * (n / 2 + new - 1), rel=0.01)
        assert one["prefill_ms"] > 0 < one["decode_ms"]
    mean = sum(one["kv_bytes"] for one in took(results)) / 18
    assert results["throughput"]["avg_zipvl_generate_until_kv_bytes"] == pytest.approx(mean)
    tokens = sum(one["output_tokens"] for one in took(results))
    assert results["throughput"]["total_gen_tokens"] == tokens


def test_the_base_is_measured_too(evaluate, model):
    dense = evaluate("zipvl", f"pretrained={model},backend=none", "digits")
    every = evaluate("zipvl", f"pretrained={model},{EVERY}", "digits")
    assert answers(dense) == answers(every)
    assert [one["kv_bytes"] for one in took(dense)] == [one["kv_bytes_dense"] for one in took(every)]
    assert all(one["kept"] == 1 and one["prefill_ms"] > 0 for one in took(dense))
