"""Dense and zipvl side by side: one model's weights, the same prompts in turns, what each answer took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.tiny_llava import compiled, inputs, model
from transformers import DynamicCache, MistralConfig
from transformers.cache_utils import StaticLayer

from zipvl_compile.cache.buffers import spare_tokens
from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.demo import compare as module
from zipvl_compile.demo.compare import (
    Answer,
    Comparison,
    answer,
    compare,
    compiled_copy,
    medians,
    reached,
    warm_up,
)
from zipvl_compile.passes.match.outcome import SiteOutcome
from zipvl_compile.passes.match.reasons import Why
from zipvl_compile.report.compile_report import CompileReport, collect

PROCESSOR = SimpleNamespace(batch_decode=lambda ids, **_: [" ".join(map(str, row.tolist())) for row in ids])


def made(text="a", prompt_length=10, kept=(), first=1.0, later=None):
    return Answer(text, prompt_length, list(kept), first, later, 8, 16)


def outcome(kind, reason=None):
    return CompileReport([SiteOutcome("layer", kind, reason)])


def test_agreement_is_the_share_of_equal_texts():
    result = Comparison({"dense": [made("a"), made("b")], "zipvl": [made("b")] * 2, "chosen": [made("a"), made("c")]})
    assert result.same == [True, False] and result.agreement == 0.5


def test_kept_tokens_are_averaged_per_layer_over_the_prompts():
    short, long = (torch.arange(n) for n in (2, 6))
    result = Comparison({"dense": [], "zipvl": [made(kept=(short, None)), made(prompt_length=20, kept=(long, None))]})
    assert result.kept_per_layer() == [(4, pytest.approx((2 / 10 + 6 / 20) / 2)), None]


def test_medians_leave_out_answers_of_one_token():
    assert medians([made(first=1.0), made(first=3.0, later=0.5), made(first=2.0, later=0.1)]) == (2.0, 0.3)
    assert medians([made(first=1.0)]) == (1.0, None)


def test_an_answer_says_what_it_took():
    x, f = inputs(text=20), compiled(keep_ratio=0.5)
    n = x["input_ids"].shape[1]
    got = answer(f, PROCESSOR, x, 4)
    tokens = f.generate(**x, max_new_tokens=4, do_sample=False)[0, n:].tolist()
    assert got.text == " ".join(map(str, tokens)) and got.prompt_length == n and got.kinds == ["full attention"] * 2
    kept = -(-n // 2)
    assert [positions.shape for positions in got.kept] == [(kept,)] * 2
    assert all((positions < n).all() for positions in got.kept), "prompt tokens only"
    per_token = 2 * 2 * 2 * 16 * 4  # K and V, 2 layers, 2 heads of 16, fp32
    positions = 2 * kept * 8  # 2 layers, int64
    assert got.kv_used == (kept + 3) * per_token
    assert got.kv_allocated == (kept + spare_tokens(n)) * per_token + positions
    assert got.first_token > 0 and got.per_token > 0
    plain = answer(model(), PROCESSOR, x, 1)
    assert plain.per_token is None and plain.kv_used == n * per_token


def test_a_model_without_a_cache_is_named():
    f = model()
    f.generation_config.use_cache = False
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration.*use_cache=True"):
        answer(f, PROCESSOR, inputs(text=6), 2)


@pytest.mark.parametrize("first", ["dense", "zipvl"])
def test_copies_share_their_weights_and_are_compiled_alike_in_either_order(first):
    torch._dynamo.reset()
    f = model()
    variants = {"dense": None, "zipvl": {"tau": 1.0, "min_tokens": 0}}
    names = sorted(variants, key=lambda name: name != first)
    with collect() as reports:
        models = {name: compiled_copy(f, variants[name], inner="eager") for name in names}
        x = inputs(text=12)
        for name in names:
            warm_up(models[name], PROCESSOR, [x])
            assert torch._dynamo.config.recompile_limit == 64
    assert f._compiled_call_impl is None
    for one in models.values():
        ours = dict(one.named_parameters())
        assert all(ours[name] is weight for name, weight in f.named_parameters())
    assert all(site.rewritten for site in reached(models["zipvl"], reports))
    assert compare({name: models[name] for name in variants}, PROCESSOR, [x], 4).agreement == 1


def test_the_same_options_again_are_compiled_again():
    """Else nothing would be known of what became of the prompt."""
    f, x = model(), inputs(text=12)
    for _ in range(2):
        with collect() as reports:
            warm_up(compiled_copy(f, {}, inner="eager"), PROCESSOR, [x])
        assert all(site.reason.why is Why.SHORT_PROMPT for site in reached(f, reports))


def test_a_prefill_that_zipvl_did_not_reach_is_an_error():
    assert len(reached(None, [outcome("prefill"), outcome("other")])) == 1
    with pytest.raises(ValueError, match=r"got SimpleNamespace.*language_model\.compile"):
        reached(SimpleNamespace(), [outcome("other"), outcome("decode")])


def test_cache_layers_are_named():
    config = MistralConfig(num_hidden_layers=1, sliding_window=4)
    kinds = [module._kind(layer) for layer in (DynamicCache(config=config).layers[0], StaticLayer(4), CompactLayer())]
    assert kinds == ["sliding window", "static", "full attention"]
    assert module._kind(torch.nn.Identity()) == "Identity"


def test_models_take_turns_in_going_first(monkeypatch):
    order = []
    monkeypatch.setattr(module, "answer", lambda f, processor, prompt, tokens: order.append((f, prompt)) or made())
    advanced = []
    result = compare({"dense": "d", "zipvl": "z", "chosen": "c"}, None, [0, 1, 2], 1, lambda: advanced.append(1))
    assert [f for f, _ in order] == ["d", "z", "c", "z", "c", "d", "c", "d", "z"]
    assert [prompt for _, prompt in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(advanced) == 3 == len(result.dense) == len(result.sparse)


def test_every_length_is_warmed_up_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "answer", lambda f, processor, x, tokens, min_new_tokens: seen.append(x["input_ids"].shape[1]) or made()
    )
    warm_up(None, None, [{"input_ids": torch.ones(1, n)} for n in (5, 7, 5)])
    assert seen == [5, 7]
