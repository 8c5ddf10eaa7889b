"""Models as variants want them."""

import torch
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import model, prompt

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.evaluate.compiled import Compiled, compiled_for


def kept_by(compiled, options, n=40):
    """Return kept tokens of each layer, and whether the variant was traced for it."""
    with compiled.as_variant(options) as (variant, new):
        cache = cache_of(variant(input_ids=prompt(n), logits_to_keep=1))
        return [layer.positions.shape[2] for layer in cache.layers], new


def test_without_options_it_is_the_model_itself():
    llama = model()
    with Compiled(llama).as_variant({}) as (variant, new):
        assert variant is llama and not new


def test_variants_of_one_rule_share_a_trace():
    compiled = Compiled(model())
    assert kept_by(compiled, {"policy": "paper", "keep_ratio": 0.5}) == ([20, 20], True)
    assert kept_by(compiled, {"policy": "fixed_ratio", "keep_ratio": 0.25}) == ([10, 10], False)
    adaptive, new = kept_by(compiled, {"policy": "paper", "tau": 0.6})
    assert not new and all(count < 40 for count in adaptive) and adaptive != [20, 20]
    assert kept_by(compiled, {"policy": "paper", "tau": 0.6, "floor": 0.95}) == ([38, 38], False)
    assert kept_by(compiled, {"policy": "hold", "keep_ratio": 0.25}) == ([11, 11], True), "and the first token"
    assert kept_by(compiled, {"tau": 1.0}) == ([40, 40], True)
    assert kept_by(compiled, {"policy": "fixed_ratio", "keep_ratio": 0.25}) == ([10, 10], True)


def test_short_prompts_of_any_length_are_compacted_by_the_same_weights():
    llama = model()
    compiled = compiled_for(llama, {"keep_ratio": 0.5})
    assert compiled is not llama and compiled.lm_head.weight is llama.lm_head.weight
    frames = []
    for n in (20, 24, 40):
        cache = cache_of(compiled(input_ids=prompt(n), logits_to_keep=1))
        assert [layer.positions.shape[2] for layer in cache.layers] == [n // 2, n // 2]
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert frames[0] == frames[2], "nothing compiles after the first length"
