"""A prompt that comes in parts: the later ones are right, and not sparse, which is said once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.tiny_llava import compiled, inputs, model, prompt_cache, step

from zipvl_compile import explain
from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.hf_names import as_argument
from zipvl_compile.report import compile_report

PART = torch.randint(6, 128, (1, 140), generator=torch.Generator().manual_seed(5))
DRAFT = PART[:, :5]
SAID = "a later part of a prompt"


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compile_report, "_warned", set())


OVER = {"a compacted cache": {"tau": 0.7}, "a full cache": {"min_tokens": 100}}


@pytest.mark.parametrize("over", OVER)
def test_a_later_part_is_said_once_and_draft_tokens_are_not(over):
    f = compiled(**OVER[over])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for tokens in (DRAFT, PART[:, :6]):  # of one length, then of any
            step(f, tokens, prompt_cache(f, inputs(text=20)))
        assert not any(SAID in str(one.message) for one in said)
        with compile_report.collect() as reports:
            for tokens in (PART, PART[:, :135]):
                step(f, tokens, prompt_cache(f, inputs(text=20)))
        assert sum(SAID in str(one.message) for one in said) == 1
    assert SAID in str(reports[0])


def test_explain_takes_a_cache_and_says_it_of_every_layer():
    f = compiled(tau=0.7)
    cache = prompt_cache(f, inputs(text=20))
    before = copy.deepcopy(cache)
    explanation = explain(model(), options={"min_tokens": 0, "tau": 0.7}, input_ids=PART, **as_argument(cache))
    rows = [row for row in explanation.rows if row.note is not None]
    assert len(rows) == 2 and all(row.kind == "decode" and not row.reason for row in rows)
    assert SAID in str(explanation) and explanation.prompt_length == cache.get_seq_length() + PART.shape[1]
    for one, other in zip(cache.layers, before.layers, strict=True):  # the user's cache is as it was
        assert isinstance(one, CompactLayer) and torch.equal(one.key_buffer[:, :, : one.cached_length], other.keys)
