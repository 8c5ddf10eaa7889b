"""Models as variants want them."""

import torch
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import model, prompt

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.evaluate.compiled import compiled_for


def test_without_options_it_is_the_model_itself():
    llama = model()
    assert compiled_for(llama, {}) is llama


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
