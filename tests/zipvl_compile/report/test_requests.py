"""What each `generate` did, collected or printed, and the same answers as without anyone watching."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.tiny_llava import compiled, inputs, model
from transformers import GenerationConfig, StoppingCriteria

import zipvl_compile
from zipvl_compile import stats
from zipvl_compile.report.requests import RequestStats, requests

PROMPT = inputs(text=20)
LENGTH = PROMPT["input_ids"].shape[1]
ASK = {"max_new_tokens": 5, "do_sample": False}


def test_one_entry_a_generate_with_what_its_cache_says():
    f = compiled(keep_ratio=0.5)
    with requests() as done:
        out = f.generate(**PROMPT, **ASK, return_dict_in_generate=True)
        f.generate(**PROMPT, **ASK)
    first, second = done
    assert first.cache == stats(out) == second.cache
    assert (first.model, first.batch, first.prompt_tokens) == ("LlavaForConditionalGeneration", 1, LENGTH)
    assert first.new_tokens == 5 and first.dense == {}
    assert 0.5 <= first.kept < 0.6
    assert first.prefill_ms > second.prefill_ms > 0 < second.decode_ms  # the first one compiles
    assert first.compiled >= 2 and second.compiled == 0


def test_answers_and_their_form_are_those_without_a_watch():
    f = compiled(tau=0.9)
    plain, whole = f.generate(**PROMPT, **ASK), f.generate(**PROMPT, **ASK, return_dict_in_generate=True)
    with requests():
        watched = f.generate(**PROMPT, **ASK)
        watched_whole = f.generate(**PROMPT, **ASK, return_dict_in_generate=True)
        by_config = f.generate(**PROMPT, generation_config=GenerationConfig(**ASK, return_dict_in_generate=True))
    assert isinstance(watched, torch.Tensor) and watched.equal(plain)
    assert type(watched_whole) is type(whole) is type(by_config)
    assert watched_whole.sequences.equal(whole.sequences) and by_config.sequences.equal(whole.sequences)


class After(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= LENGTH + 3)


@pytest.mark.parametrize("positional", [False, True])
def test_criteria_of_the_caller_hold(positional):
    f = compiled(tau=0.9)
    with requests() as done:
        if positional:  # inputs, generation_config, logits_processor, stopping_criteria
            ids, others = PROMPT["input_ids"], {k: v for k, v in PROMPT.items() if k != "input_ids"}
            f.generate(ids, GenerationConfig(**ASK), None, [After()], **others)
        else:
            f.generate(**PROMPT, **ASK, stopping_criteria=[After()])
    assert done[0].new_tokens == 3


def test_batches_beams_and_one_token():
    f = compiled(tau=0.9)
    two = {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in PROMPT.items()}
    with requests() as done:
        f.generate(**two, **ASK)
        f.generate(**PROMPT, **ASK, num_beams=3)
        f.generate(**PROMPT, max_new_tokens=1, do_sample=False)
    assert [one.batch for one in done] == [2, 1, 1]
    assert [one.prompt_tokens for one in done] == [LENGTH] * 3
    assert done[2].decode_ms is None and done[2].new_tokens == 1
    assert " x 2;" in str(done[0]) and "each" not in str(done[2])


def test_a_prompt_that_stays_dense_says_why():
    f = compiled(min_tokens=500)
    with requests() as done:
        f.generate(**PROMPT, **ASK)
    assert list(done[0].dense.values()) == [2] and "min_tokens=500" in next(iter(done[0].dense))
    assert done[0].kept == 1.0 and "2 layers dense" in str(done[0]) and "0% saved" in str(done[0])


def test_nothing_is_collected_of_others_nor_after_the_block():
    f = compiled(tau=0.9)
    with requests() as done:
        model().generate(**PROMPT, **ASK)  # not compiled
        elsewhere = threading.Thread(target=lambda: f.generate(**PROMPT, **ASK))
        elsewhere.start()
        elsewhere.join()
    f.generate(**PROMPT, **ASK)
    assert done == []


def test_every_model_counts_where_asked():
    f = model()
    with requests() as ours, requests(every_model=True) as every:
        out = f.generate(**PROMPT, **ASK, return_dict_in_generate=True)
    assert ours == [] and len(every) == 1
    assert every[0].cache == stats(out) and every[0].prompt_tokens == LENGTH and every[0].new_tokens == 5
    assert every[0].kept == 1.0 and every[0].dense == {} and every[0].decode_ms > 0


def test_a_failure_is_no_entry_and_the_next_is_one():
    f = compiled(tau=0.9)
    with requests() as done:
        with pytest.raises(ValueError):
            f.generate(**PROMPT, max_new_tokens=-1)
        f.generate(**PROMPT, **ASK)
    assert [one.new_tokens for one in done] == [5]


def test_plain_dicts_for_json():
    with requests() as done:
        compiled(keep_ratio=0.5).generate(**PROMPT, **ASK)
    plain = json.loads(json.dumps(done[0].as_dict()))
    assert plain["prompt_tokens"] == LENGTH and plain["kept"] == done[0].kept
    assert plain["cache"]["bytes_used"] == done[0].cache.bytes_used
    assert [one["kept"] for one in plain["cache"]["layers"]] == [one.kept for one in done[0].cache.layers]
    assert set(RequestStats.__dataclass_fields__) < set(plain)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from support.tiny_llava import inputs, model
del sys.path[0]
f = model()
f.compile(backend="zipvl", options=dict(keep_ratio=0.5, min_tokens=0, inner="eager"))
for _ in range(2):
    f.generate(**inputs(text=20), max_new_tokens=3, do_sample=False)
"""
LINE = (
    rf"zipvl: LlavaForConditionalGeneration: {LENGTH} prompt tokens; 5\d% kept; KV 0\.\d MB, 4\d% saved; "
    r"prefill \d+ ms; 3 new tokens, \d+\.\d ms each"
)


@pytest.mark.parametrize("asked", ["1", "0"])
def test_the_environment_asks_for_a_line_each(asked, monkeypatch):
    monkeypatch.setenv("ZIPVL_LOG", asked)
    script = SCRIPT.format(tests=str(Path(zipvl_compile.__file__).parents[1] / "tests"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("zipvl: Llava")]
    assert done.returncode == 0 and len(lines) == (2 if asked == "1" else 0), done.stderr
    if lines:
        assert re.fullmatch(LINE + r"; \d graphs compiled meanwhile", lines[0]), lines[0]
        assert re.fullmatch(LINE, lines[1]), lines[1]
