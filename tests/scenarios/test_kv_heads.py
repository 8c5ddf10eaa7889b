"""One selection for each KV head, groups="kv_head", through prefill, decode, crop, beams and padding."""

import copy

import pytest
import torch
from support import tiny_llama
from support.tiny_llava import compiled, inputs, model, prompt_cache, shared, step

import zipvl_compile
from zipvl_compile.cache.hf_names import cache_of

EVERY, SPARSE = {"tau": 1.0, "groups": "kv_head"}, {"tau": 0.7, "groups": "kv_head"}
POLICIES = ("paper", "hold", "window", "union", "snapkv")


def test_heads_keep_as_many_tokens_each_but_others():
    f = tiny_llama.compiled(**SPARSE)
    x = tiny_llama.prompt(100, batch=2)
    stock = cache_of(tiny_llama.model()(x, use_cache=True)).layers[0]
    cache = cache_of(f(x, use_cache=True, logits_to_keep=1))
    layer, kept = cache.layers[0], zipvl_compile.kept_tokens(cache)[0]
    assert kept.shape[:2] == (2, 2) and kept.shape[2] < 100
    assert all(not torch.equal(*heads) for heads in kept)
    index = kept[..., None].expand(-1, -1, -1, stock.keys.shape[3])
    torch.testing.assert_close(layer.keys, stock.keys.gather(2, index), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.values, stock.values.gather(2, index), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_where_every_token_is_kept_it_is_the_dense_model(policy, beams):
    x = inputs(batch=2, text=20, pad=7)
    run = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    assert torch.equal(shared(policy=policy, **EVERY).generate(**x, **run), model().generate(**x, **run))


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_and_steps_continue_from_what_each_head_kept(policy):
    f, x = shared(policy=policy, **SPARSE), inputs(text=20)
    run = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    greedy = f.generate(**x, **run)
    with torch.no_grad():
        cache, length = cache_of(f(**x, use_cache=True, logits_to_keep=1)), x["input_ids"].shape[1]
    tokens = greedy.sequences[:, length:]
    # One beam of several copies of a sample, by hand.
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    for i in range(7):
        logits = step(f, tokens[:, i : i + 1].expand(3, -1), cache).logits[:, -1]
        torch.testing.assert_close(logits, greedy.scores[i + 1].expand(3, -1), atol=2e-5, rtol=1e-4)
    assert len(f.generate(**x, num_beams=3, **run).sequences[0]) == length + 8


def test_one_token_of_an_uncompiled_model_sees_what_each_head_kept():
    f, x = compiled(**SPARSE), inputs(text=20)
    cache = prompt_cache(f, x)
    token = torch.tensor([[9]])
    got = step(f, token, copy.deepcopy(cache)).logits
    torch.testing.assert_close(got, step(model(), token, cache).logits, atol=2e-5, rtol=1e-4)


def test_a_cut_through_the_prompt_is_refused():
    torch._dynamo.reset()  # the tests before it may reach Dynamo's recompile limit, past which a prompt is left dense
    cache = prompt_cache(shared(**SPARSE), inputs(text=20))
    step(shared(**SPARSE), torch.tensor([[9, 10]]), cache)
    with pytest.raises(ValueError, match="of a batch of 1 with 2 selections each"):
        cache.crop(-10)
    cache.crop(-2)
    assert cache.get_seq_length() == inputs(text=20)["input_ids"].shape[1]


def test_the_budget_of_one_request():
    f = tiny_llama.compiled(**SPARSE)
    for options, count in (({"keep_ratio": 0.3}, 30), ({"keep_tokens": 12}, 12)):
        with zipvl_compile.settings(**options):
            out = f(tiny_llama.prompt(100), use_cache=True, logits_to_keep=1)
        assert [tuple(kept.shape) for kept in zipvl_compile.kept_tokens(out)] == [(1, 2, count)] * 2
