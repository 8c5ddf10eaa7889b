"""A base that pads its batches: each answer is that of the base, alone or in a batch, and each document is measured."""

from __future__ import annotations

import pytest

pytest.importorskip("lmms_eval")

from support.tiny_gemma import IMAGE_TOKENS, write_gemma

OPTIONS = "inner=eager,min_tokens=0"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma"))


def answers(results):
    return [one["filtered_resps"][0] for one in results["samples"]["digits"]]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_the_base(evaluate, gemma, batch_size):
    base = evaluate("gemma3", f"pretrained={gemma},device_map=cpu", "digits", batch_size=batch_size)
    every = evaluate("zipvl", f"pretrained={gemma},tau=1,{OPTIONS}", "digits", batch_size=batch_size)
    assert answers(every) == answers(base)
    assert len(set(answers(base))) > 1 and all(answers(base)), "different answers; else equal ones say little"


def test_every_document_of_a_batch_is_measured(evaluate, gemma):
    results = evaluate("zipvl", f"pretrained={gemma},keep_ratio=0.5,{OPTIONS}", "digits", batch_size=4)
    counts = [one["token_counts"][0] for one in results["samples"]["digits"]]
    assert len(counts) == 18 and sorted(one.get("batch", 1) for one in counts) == [2] * 2 + [4] * 16
    for one in counts:
        assert one["prompt_tokens"] % 8 == 0 and one["prompt_tokens"] > IMAGE_TOKENS
        assert one["kv_bytes"] < one["kv_bytes_dense"]


def test_what_the_base_does_not_implement_is_said(evaluate, gemma):
    with pytest.raises(NotImplementedError, match=r"Not implemented for Gemma3"):
        evaluate("zipvl", f"pretrained={gemma},tau=1", "digits_choice")
