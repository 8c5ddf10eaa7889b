"""What is measured is said of the right documents, and measuring changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.tiny_llava import compiled, inputs, model

from zipvl_compile.lmms.watching import Asked, TimedCalls, documents_asked
from zipvl_compile.report.requests import RequestStats
from zipvl_compile.report.stats import stats

DOCUMENTS = {"task": {"test": ["a", "b", "c", "d"]}, "other": {"test": ["e"]}}


def took(batch=1):
    return RequestStats("M", batch, 8, 1, 1.0, None, 0)


def test_documents_read_before_a_measurement_are_what_it_is_of():
    done = []
    asked = Asked(DOCUMENTS, done)
    assert asked["task"]["test"][1] == "b" and len(asked["task"]["test"]) == 4
    done.append(took())
    assert [asked["task"]["test"][i] for i in (2, 0)] == ["c", "a"]
    done.append(took(batch=2))
    asked["other"]["test"][0]
    done.append(took())
    asked["task"]["test"][1]
    done.append(took())
    first, both, last, again = done
    expected = {("task", 1): [first, again], ("task", 2): [both], ("task", 0): [both], ("other", 0): [last]}
    got = asked.measured()
    assert got == expected and got["task", 1][0] is first and got["task", 3] == []


def test_a_document_whose_call_failed_has_no_measurement():
    done = []
    asked = Asked(DOCUMENTS, done)
    asked["task"]["test"][0]  # its call raises, and lmms-eval's model goes on
    asked["task"]["test"][1]
    done.append(took())
    assert asked.measured() == {("task", 1): done}


def test_documents_are_put_back():
    lm = SimpleNamespace(task_dict=DOCUMENTS)
    with pytest.raises(KeyError), documents_asked(lm, []) as asked:
        assert lm.task_dict is asked
        raise KeyError
    assert lm.task_dict is DOCUMENTS


@pytest.mark.parametrize("ours", [False, True], ids=["dense", "zipvl"])
def test_a_call_is_measured_and_returns_what_it_returns_without(ours):
    f, x = compiled(keep_ratio=0.5) if ours else model(), inputs(text=20)
    done = []
    timed = TimedCalls(f, done)
    assert timed.dtype == torch.float32 and timed.config is f.config
    with torch.inference_mode():
        out, plain = timed(**x, labels=x["input_ids"]), f(**x, labels=x["input_ids"])
    torch.testing.assert_close(out["logits"], plain["logits"])
    assert out["loss"] == plain["loss"]
    (one,) = done
    assert one.cache == stats(out) and (one.batch, one.prompt_tokens) == x["input_ids"].shape
    assert one.prefill_ms > 0 and (one.kept < 0.6) == ours and (one.compiled > 0) == ours
