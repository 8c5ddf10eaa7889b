"""Dense and zipvl side by side: one model's weights, the same prompts in turns, what each answer took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.tiny_llava import compiled, inputs, model

from zipvl_compile.cache.buffers import spare_tokens
from zipvl_compile.demo import compare as module
from zipvl_compile.demo.compare import (
    Answer,
    Comparison,
    answer,
    check_compacted,
    compare,
    compiled_pair,
    medians,
    warm_up,
)

PROCESSOR = SimpleNamespace(batch_decode=lambda ids, **_: [" ".join(map(str, row.tolist())) for row in ids])


def made(text="a", prompt_length=10, kept=(), first=1.0, later=None, compacted=True):
    return Answer(text, prompt_length, list(kept), first, later, 8, 16, compacted)


def test_agreement_is_the_share_of_equal_texts():
    result = Comparison([made("a"), made("b")], [made("a"), made("c")])
    assert result.same == [True, False] and result.agreement == 0.5


def test_kept_tokens_are_averaged_per_layer_over_the_prompts():
    short, long = (torch.arange(n) for n in (2, 6))
    result = Comparison(sparse=[made(kept=(short, None)), made(prompt_length=20, kept=(long, None))])
    assert result.kept_per_layer() == [(4, pytest.approx((2 / 10 + 6 / 20) / 2)), None]


def test_medians_leave_out_answers_of_one_token():
    assert medians([made(first=1.0), made(first=3.0, later=0.5), made(first=2.0, later=0.1)]) == (2.0, 0.3)
    assert medians([made(first=1.0)]) == (1.0, None)


def test_an_answer_says_what_it_took():
    x, f = inputs(text=20), compiled(keep_ratio=0.5)
    n = x["input_ids"].shape[1]
    got = answer(f, PROCESSOR, x, 4)
    tokens = f.generate(**x, max_new_tokens=4, do_sample=False)[0, n:].tolist()
    assert got.text == " ".join(map(str, tokens)) and got.prompt_length == n and got.compacted
    kept = -(-n // 2)
    assert [positions.shape for positions in got.kept] == [(kept,)] * 2
    assert all((positions < n).all() for positions in got.kept), "prompt tokens only"
    per_token = 2 * 2 * 2 * 16 * 4  # K and V, 2 layers, 2 heads of 16, fp32
    assert got.kv_used == (kept + 3) * per_token and got.kv_allocated == (kept + spare_tokens(n)) * per_token
    assert got.first_token > 0 and got.per_token > 0
    plain = answer(model(), PROCESSOR, x, 1)
    assert plain.per_token is None and not plain.compacted and plain.kv_used == n * per_token


def test_a_model_without_a_cache_is_named():
    f = model()
    f.generation_config.use_cache = False
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration.*use_cache=True"):
        answer(f, PROCESSOR, inputs(text=6), 2)


def test_a_pair_shares_its_weights_and_agrees_where_every_token_is_kept():
    f = model()
    dense, sparse = compiled_pair(f, {"tau": 1.0, "min_tokens": 0}, inner="eager")
    assert dense is f and sparse is not f
    ours = dict(sparse.named_parameters())
    assert all(ours[name] is weight for name, weight in dense.named_parameters())
    x = inputs(text=12)
    check_compacted(sparse, warm_up(sparse, PROCESSOR, [x]))
    assert compare(dense, sparse, PROCESSOR, [x], 4).agreement == 1


def test_a_prefill_that_zipvl_did_not_reach_is_an_error():
    with pytest.raises(ValueError, match=r"got SimpleNamespace.*language_model\.compile"):
        check_compacted(SimpleNamespace(), made(compacted=False))


def test_models_take_turns_in_going_first(monkeypatch):
    order = []
    monkeypatch.setattr(module, "answer", lambda f, processor, prompt, tokens: order.append((f, prompt)) or made())
    advanced = []
    result = compare("dense", "sparse", None, [0, 1, 2], 1, lambda: advanced.append(1))
    assert [f for f, _ in order] == ["dense", "sparse", "sparse", "dense", "dense", "sparse"]
    assert [prompt for _, prompt in order] == [0, 0, 1, 1, 2, 2]
    assert len(advanced) == 3 == len(result.dense) == len(result.sparse)


def test_every_length_is_warmed_up_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "answer", lambda f, processor, x, tokens, min_new_tokens: seen.append(x["input_ids"].shape[1]) or made()
    )
    warm_up(None, None, [{"input_ids": torch.ones(1, n)} for n in (5, 7, 5)])
    assert seen == [5, 7]
