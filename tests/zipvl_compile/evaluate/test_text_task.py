"""Documents on a tiny random Llama: what is measured is what one forward over the whole text says."""

import random
from types import SimpleNamespace

import pytest
import torch
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import model, prompt

from zipvl_compile.evaluate.documents import Document
from zipvl_compile.evaluate.text_task import CONTINUATION, CUE, REPEATED, TextTask, passage_start

N = 300


def tokenizer(text, return_tensors):
    length, seed = map(int, text.split())
    return SimpleNamespace(input_ids=prompt(length, seed=seed))


def task(lengths=(500, 450), tokens=N, most=12):
    documents = [Document(f"d{seed}", f"{length} {seed}") for seed, length in enumerate(lengths)]
    return TextTask("tiny", model(), tokenizer, documents, "report", tokens, most)


@pytest.fixture(scope="module")
def dense():
    done = []
    one = task()
    items = one.run({}, lambda: done.append(1))
    assert len(done) == one.count == 2 and one.case == "tiny, 2 documents (report), 300 tokens"
    return one, items


def test_dense_is_the_model_itself(dense):
    _, items = dense
    for seed, item in enumerate(items):
        ids = prompt((500, 450)[seed], seed=seed)[:, : N + CONTINUATION]
        whole = model()(input_ids=ids).logits[0, N - 1 : -1].log_softmax(1)
        assert item["nll"] == pytest.approx(-whole.gather(1, ids[0, N:, None]).mean().item(), abs=1e-5)
        assert (item["kl"], item["agreement"], item["kept"]) == (0, 1, 1)
        assert item["item"] == f"d{seed}" and item["kv_bytes"] == item["kv_bytes_allocated"] == N * 512


def test_a_passage_is_repeated_after_the_prompt(dense):
    start, ids = passage_start("d0", N), prompt(500)[:, :N]
    passage = ids[:, start : start + CUE + REPEATED]
    whole = model()(input_ids=torch.cat([ids, passage], 1)).logits[0, N + CUE - 1 : -1].log_softmax(1)
    by_hand = -whole.gather(1, passage[0, CUE:, None]).mean().item()
    assert dense[1][0]["rep_nll"] == pytest.approx(by_hand, abs=1e-5)


def test_the_passage_stays_where_it_is():
    assert passage_start("d0", N) == passage_start("d0", N) == random.Random("d0").randrange(16, N - 192)
    starts = {passage_start(f"d{i}", 1024) for i in range(50)}
    assert len(starts) > 30 and min(starts) >= 16 and max(starts) + CUE + REPEATED < 1024 - 64


def test_where_every_token_is_kept_nothing_differs(dense):
    one, base = dense
    for item, of_dense in zip(one.run({"tau": 1.0}), base, strict=True):
        assert item["kept"] == 1 and item["agreement"] == 1 and abs(item["kl"]) < 1e-6
        for metric in ("nll", "rep_nll"):
            assert item[metric] == pytest.approx(of_dense[metric], abs=1e-5)
        assert item["kv_bytes"] == of_dense["kv_bytes"] < item["kv_bytes_allocated"]


def test_dropped_tokens_cost_quality_and_save_bytes_and_flops(dense):
    one, base = dense
    for item, of_dense in zip(one.run({"keep_ratio": 0.2}), base, strict=True):
        assert item["kept"] == 0.2 and item["kv_bytes"] == 0.2 * of_dense["kv_bytes"]
        assert item["kl"] > 1e-3 and item["prefill_flops"] < of_dense["prefill_flops"]


def test_documents_that_are_too_short_are_left_out():
    assert [name for name, _ in task((500, N + CONTINUATION - 1, N + CONTINUATION)).prompts] == ["d0", "d2"]
    assert [name for name, _ in task((500, 450, 460), most=2).prompts] == ["d0", "d1"]
    with pytest.raises(ValueError, match=r"--tokens: expected at most 372, .* has 500 tokens, .* got 400"):
        task(tokens=400)
    with pytest.raises(ValueError, match="--tokens: expected at least 256, got 100"):
        task(tokens=100)


def test_texts_have_no_picture_to_make_smaller():
    one = task()
    assert one.takes({"tau": 0.9}) and not one.takes({"picture_scale": 0.5})


def test_dense_comes_first():
    with pytest.raises(ValueError, match="expected dense to be measured before others"):
        task().run({"tau": 0.9})
