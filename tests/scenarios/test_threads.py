"""Several threads, each with a request of its own: the answers of one thread alone, whatever else runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import tiny_llama

import zipvl_compile
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.report.compile_report import collect

NEW, REQUESTS = 12, 6


@pytest.fixture(autouse=True)
def from_the_start():
    torch._dynamo.reset()


def answer(f, seed, start=None, **settings):
    """Return the tokens that follow a prompt of a seed, and how many of it each layer kept."""
    ids = tiny_llama.prompt(60 + 5 * seed, seed=seed)
    if start is not None:
        start.wait(timeout=120)
    with zipvl_compile.settings(**settings):
        out = f.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    return out.sequences[0, ids.shape[1] :].tolist(), [layer.positions.shape[2] for layer in cache_of(out).layers]


def together(jobs):
    """Return what each job returns; all begin at once."""
    start = threading.Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=300) for future in [pool.submit(job, start) for job in jobs]]


@pytest.mark.parametrize("warm", [True, False], ids=["compiled before", "compiled by the threads"])
def test_one_model_many_requests(warm):
    alone = tiny_llama.compiled(keep_ratio=0.5)
    expected = [answer(alone, seed) for seed in range(REQUESTS)]
    torch._dynamo.reset()
    f = tiny_llama.compiled(keep_ratio=0.5)
    if warm:
        for seed in (1, 2):
            answer(f, seed)
    jobs = [lambda start, seed=seed: answer(f, seed, start) for seed in range(REQUESTS)]
    assert together(jobs) == expected


def test_two_models_with_options_of_their_own():
    models = {ratio: tiny_llama.compiled(keep_ratio=ratio) for ratio in (0.3, 0.6)}
    expected = [answer(f, seed) for seed in range(2) for f in models.values()]
    again = [lambda start, f=f, seed=seed: answer(f, seed, start) for seed in range(2) for f in models.values()]
    assert together(again) == expected
    assert [kept for _, kept in expected] == [[18, 18], [36, 36], [20, 20], [39, 39]]


def test_numbers_of_a_request_stay_in_its_thread():
    f = tiny_llama.compiled(keep_ratio=0.5)
    ratios = (0.2, 0.4, 0.6, 0.8)
    expected = [answer(f, 4, keep_ratio=ratio) for ratio in ratios]
    with collect() as reports:
        got = together([lambda start, r=r: answer(f, 4, start, keep_ratio=r) for r in ratios])
    assert got == expected and not reports
    assert [kept[0] for _, kept in got] == [16, 32, 48, 64]
