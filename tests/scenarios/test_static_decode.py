"""`cache_implementation="static"`: kept tokens in tensors of fixed size, and decode graphs that never change."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
import transformers
from support import tiny_llama, tiny_models
from support.tiny_llava import compiled, inputs, model
from torch.fx.experimental.symbolic_shapes import is_symbolic
from transformers import StaticCache

import zipvl_compile
from zipvl_compile import backend as backend_module
from zipvl_compile.cache.compact_static_layer import CompactStaticLayer
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.kernels.fixed_rows import bucket
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.report.compile_report import collect

NEW = 9
STATIC = {"cache_implementation": "static"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def run(f, x, new=NEW, **how):
    """Return what greedy decoding gives: tokens, logits and the cache."""
    options = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return f.generate(**x, **options | how)


def assert_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


RULES = {
    "default": {},
    "paper": {"policy": "paper", "keep_ratio": 0.4},
    "tau": {"policy": "paper", "tau": 0.8},
    "hold": {"policy": "hold", "keep_ratio": 0.4},
    "window": {"policy": "window", "keep_ratio": 0.4, "window": 8},
    "skip layers": {"policy": "skip_layers", "keep_ratio": 0.5, "dense_layers": 1},
    "heads": {"policy": "paper", "keep_ratio": 0.4, "groups": "kv_head"},
    "full cache": {"keep_ratio": 0.4, "evict": "keep"},
    "nothing dropped": {"tau": 1.0},
}


@pytest.mark.parametrize("x", [{"text": 20}, {"batch": 3, "text": 20, "pad": 7}], ids=["one", "padded batch"])
@pytest.mark.parametrize("rule", RULES)
def test_a_static_cache_gives_what_a_growing_one_does(rule, x):
    f, x = compiled(**RULES[rule]), inputs(**x)
    expected = run(f, x)
    with collect() as reports:
        got = run(f, x, **STATIC)
    assert_same(got, expected)
    assert all(site.rewritten for report in reports for site in report.sites if site.kind == "decode")
    n = x["input_ids"].shape[1]
    for layer, other in zip(cache_of(got).layers, cache_of(expected).layers, strict=True):
        assert type(layer) is CompactStaticLayer and layer.get_seq_length() == n + NEW - 1
        assert torch.equal(layer.cached_positions, other.cached_positions)
        torch.testing.assert_close(layer.keys, other.keys)
        torch.testing.assert_close(layer.values, other.values)


@pytest.fixture
def graphs(monkeypatch):
    """Return what is compiled: kinds of graphs, each with the inputs that are symbols or have symbols for sizes."""
    seen, compile_graph = [], backend_module._compile

    def watch(gm, example_inputs, parsed, records=True):
        values = {node.name: example(node) for node in gm.graph.find_nodes(op="placeholder")}
        sizes = {name: x.shape if isinstance(x, torch.Tensor) else [x] for name, x in values.items()}
        names = {str(node.target) for node in gm.graph.nodes}
        attends = any("decode_attention" in name for name in names)
        kind = "decode" if attends and not any("select_tokens" in name for name in names) else "other"
        seen.append((kind, [name for name, of in sizes.items() if any(map(is_symbolic, of))]))
        return compile_graph(gm, example_inputs, parsed, records)

    monkeypatch.setattr(backend_module, "_compile", watch)
    return seen


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("shape", [{}, {"batch": 2, "pad": 5}], ids=["one", "padded batch"])
def test_one_graph_decodes_all_of_a_generate(graphs, shape, inner):
    f = compiled(keep_ratio=0.5, policy="paper", inner=inner)
    x = inputs(text=20, **shape)
    first = run(f, x, 20, **STATIC)
    # A mask of two axes came with the prompt, so that Dynamo takes one of four for one of any size. Older releases of
    # transformers make one for a prompt without padding, too.
    mask = ["l_kwargs_attention_mask_"]
    allowed = [mask] if shape else [[], mask] if transformers.__version__ < "5.24" else [[]]
    assert [one for one in graphs if one[0] == "decode"] in [[("decode", symbols)] for symbols in allowed]
    del graphs[:]
    other = x | {"input_ids": x["input_ids"].clone()}
    other["input_ids"][:, -10:] = other["input_ids"][:, -10:].flip(1)
    assert not torch.equal(run(f, other, 20, **STATIC).sequences, first.sequences)
    assert not graphs, "another prompt of that length compiles nothing"


def test_cuda_graphs_are_for_decode_steps_of_one_size(monkeypatch):
    """Which graphs may be recorded with mode="reduce-overhead", which a CPU leaves out."""
    asked, compile_graph = [], backend_module.compile_with_inductor

    def watch(gm, example_inputs, mode, records=True):
        names = {str(node.target) for node in gm.graph.nodes}
        kinds = {"select_tokens": "prefill", "decode_attention": "decode"}
        asked.append((next((kind for part, kind in kinds.items() if any(part in n for n in names)), "other"), records))
        return compile_graph(gm, example_inputs, mode, records)

    monkeypatch.setattr(backend_module, "compile_with_inductor", watch)
    grew = []
    monkeypatch.setattr(backend_module, "_warn_of_a_cache_that_grows", grew.append)
    f = compiled(keep_ratio=0.5, policy="paper", inner="inductor", mode="reduce-overhead")
    got = run(f, inputs(text=20), 5, **STATIC)
    assert set(asked) == {("prefill", False), ("decode", True), ("other", True)} and not grew
    del asked[:]
    assert_same(got, run(f, inputs(text=20), 5))
    assert ("decode", False) in asked and ("decode", True) not in asked and set(grew) == {"reduce-overhead"}


@pytest.mark.parametrize(("mode", "says"), [("reduce-overhead", 1), ("default", 0)])
def test_on_a_gpu_it_is_said_that_a_growing_cache_is_not_recorded(monkeypatch, mode, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend_module._warn_of_a_cache_that_grows.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            backend_module._warn_of_a_cache_that_grows(mode)
    assert sum("records no decode steps over a KV cache that grows" in str(one.message) for one in said) == says


def test_no_guard_of_a_decode_step_depends_on_the_step():
    f, x = compiled(tau=0.8), inputs(text=20)
    run(f, x, 3, **STATIC)
    cache = StaticCache(config=f.config.get_text_config(), max_cache_len=200)
    run(f, x, 3, **as_argument(cache))
    token = torch.full((1, 1), 9)
    decoded(f, cache, token)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(100):
            decoded(f, cache, token)
    assert cache.get_seq_length() == 85 + 2 + 101


def test_prompts_of_many_lengths_share_at_most_four_decode_graphs(graphs):
    f = compiled(tau=0.8)
    for text in (12, 20, 33, 40, 21, 57, 13):
        run(f, inputs(text=text), 6, **STATIC)
    assert sum(kind == "decode" for kind, _ in graphs) <= 4
    del graphs[:]
    for text in (14, 35, 50):
        run(f, inputs(text=text), 6, **STATIC)
    assert not graphs


def prompts(family, count=30):
    """Yield prompts of mixed batch, padding and length."""
    for i in range(count):
        batch = (1, 2, 4)[i % 3]
        yield tiny_models.inputs(family, batch=batch, text=12 + i * 7 % 40, pad=3 * (i % 2) * (batch > 1), seed=i)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most"), [({}, 4), (STATIC, 4)], ids=["growing", "static"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_thirty_prompts_compile_a_few_graphs_and_then_none(graphs, family, how, most):
    f = tiny_models.compiled(family, tau=0.8)
    numbers = []
    for x in prompts(family):
        run(f, x, 5, **how)
        numbers.append(len(graphs))
    assert sum(kind == "decode" for kind, _ in graphs) <= most, graphs
    assert numbers[-1] == numbers[11], numbers


@pytest.mark.slow
def test_many_prompts_and_tokens_leave_memory_flat():
    f = compiled(tau=0.8)

    def answers(count):
        for i in range(count):
            last = run(f, inputs(text=12 + i % 9, seed=i), 4, output_logits=False, **STATIC).sequences
        gc.collect()
        return last, sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    answers(20)
    _, before = answers(20)
    last, after = answers(100)
    assert after <= before + 10, (before, after)
    x = inputs(text=20)
    long = run(f, x, 600, output_logits=False, **STATIC).sequences
    assert torch.equal(long, run(compiled(tau=0.8), x, 600, output_logits=False).sequences)
    again = run(compiled(tau=0.8), inputs(text=12 + 99 % 9, seed=99), 4, output_logits=False, **STATIC).sequences
    assert torch.equal(last, again), "as in a process that has answered nothing before"


def test_memory_is_that_of_kept_tokens_and_of_those_that_were_asked_for():
    f = compiled(keep_ratio=0.25, policy="paper")
    run(f, inputs(text=20), 200, **STATIC)
    out = run(f, inputs(text=20), 6, **STATIC)  # transformers asks for the room of the longest generate
    for layer in cache_of(out).layers:
        asked = layer.positions.shape[2] + 5
        assert layer.key_buffer.shape[2] == bucket(asked) <= asked * 1.125 + 8
    found = zipvl_compile.stats(out)
    kept = zipvl_compile.kept_tokens(out)
    for layer, held, positions in zip(found.layers, cache_of(out).layers, kept, strict=True):
        assert (layer.prompt_length, layer.kept, layer.length) == (85, 22, 90)
        assert layer.tokens == positions.shape[2] == 27 and not layer.why_dense
        assert layer.bytes_allocated >= 2 * held.key_buffer.nbytes > layer.bytes_used
        assert layer.bytes_freed == (85 - 22) * layer.bytes_used // 27


FAMILIES = ("qwen2_5_vl", "gemma3", "internvl", "qwen3_vl")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [{}, {"batch": 2, "pad": 3}], ids=["one", "padded batch"])
def test_families(family, shape):
    x = tiny_models.inputs(family, text=20, **shape)
    expected = run(tiny_models.model(family), x)
    torch._dynamo.reset()
    assert_same(run(tiny_models.compiled(family, tau=1.0), x, **STATIC), expected)
    torch._dynamo.reset()
    f = tiny_models.compiled(family, tau=0.7)
    assert_same(run(f, x, **STATIC), run(f, x))


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 2, "num_return_sequences": 2}],
)
def test_beams_and_samples(how):
    f, x = compiled(keep_ratio=0.5), inputs(text=20)
    both = []
    for cache in ({}, STATIC):
        torch.manual_seed(4)
        both.append(f.generate(**x, max_new_tokens=NEW, **{"do_sample": False} | how, **cache))
    assert torch.equal(*both)


def decoded(f, cache, tokens):
    with torch.no_grad():
        return f(input_ids=tokens, **as_argument(cache)).logits


def filled(f, n=40, room=24):
    cache = StaticCache(config=f.config, max_cache_len=n + room)
    with torch.no_grad():
        f(input_ids=tiny_llama.prompt(n), use_cache=True, logits_to_keep=1, **as_argument(cache))
    return cache


def test_a_cache_of_ones_own_in_a_loop_of_ones_own():
    f = tiny_llama.compiled(keep_ratio=0.5)
    with torch.no_grad():
        growing = cache_of(f(input_ids=tiny_llama.prompt(40), use_cache=True, logits_to_keep=1))
    fixed = filled(f)
    for m in (1, 1, 5, 1, 3):  # several new tokens see those before them
        tokens = tiny_llama.prompt(m, seed=m)
        torch.testing.assert_close(decoded(f, fixed, tokens), decoded(f, growing, tokens), atol=2e-5, rtol=1e-4)


def test_copies_go_on_alone():
    f = tiny_llama.compiled(keep_ratio=0.5)
    tokens = tiny_llama.prompt(1, seed=3)
    cache = filled(f)
    expected = decoded(f, copy.deepcopy(cache), tokens)
    others = [zipvl_compile.fork(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    for other in (*others, shallow):
        torch.testing.assert_close(decoded(f, other, tokens), expected)
        decoded(f, other, tokens)
    torch.testing.assert_close(decoded(f, cache, tokens), expected)


def test_samples_are_chosen_and_tokens_removed():
    f = tiny_llama.compiled(keep_ratio=0.5)
    tokens = tiny_llama.prompt(1, seed=3)
    cache = filled(f)
    expected = decoded(f, copy.deepcopy(cache), tokens)
    decoded(f, cache, tiny_llama.prompt(4, seed=8))
    cache.crop(-4)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    torch.testing.assert_close(decoded(f, cache, tokens.repeat(2, 1)), expected.repeat(2, 1, 1))
    before = [layer.cached_length for layer in cache.layers]
    for cut in (1, -2):
        with pytest.raises(ValueError, match=r"crop: expected a negative number .* at most the 1 after the compacted"):
            cache.layers[0].crop(cut)
    assert [layer.cached_length for layer in cache.layers] == before
    cache.reset()
    assert all(layer.get_seq_length() == 0 and layer.cached_positions is None for layer in cache.layers)


def test_a_cache_that_is_emptied_takes_another_prompt():
    f = tiny_llama.compiled(keep_ratio=0.5)
    cache = filled(f)
    cache.reset()
    with torch.no_grad():
        f(input_ids=tiny_llama.prompt(40), use_cache=True, logits_to_keep=1, **as_argument(cache))
    torch.testing.assert_close(decoded(f, cache, tiny_llama.prompt(1)), decoded(f, filled(f), tiny_llama.prompt(1)))


def test_a_compacted_one_is_not_read_outside():
    f, stock = tiny_llama.compiled(keep_ratio=0.5), tiny_llama.model()
    with pytest.raises(RuntimeError, match="keeps only the important prompt tokens"):
        decoded(stock, filled(f), tiny_llama.prompt(1))
    whole = filled(tiny_llama.compiled(tau=1.0))
    plain = filled(stock)
    for m in (1, 3):
        tokens = tiny_llama.prompt(m, seed=m)
        torch.testing.assert_close(decoded(stock, whole, tokens), decoded(stock, plain, tokens), atol=2e-5, rtol=1e-4)


def test_keys_of_a_compacted_one_know_that_tokens_are_missing():
    cache = filled(tiny_llama.compiled(keep_ratio=0.5))
    layer = cache.layers[0]
    assert layer.keys.shape[2] == 20 and layer.keys.held.prompt_length == 40
    with pytest.raises(ValueError, match="left alone"):
        layer.keys = layer.keys
    with pytest.raises(ValueError, match="batch, heads and head_dim"):
        decoded(tiny_llama.compiled(keep_ratio=0.5), cache, tiny_llama.prompt(1, 2))


def test_a_prompt_that_is_longer_than_the_cache():
    f = tiny_llama.compiled(keep_ratio=0.5)
    with pytest.raises(
        Exception, match="expected a prompt of at most 30 tokens, the length of this static cache, got 40"
    ):
        filled(f, room=-10)


def test_a_prompt_of_one_token_is_left_to_transformers():
    f = tiny_llama.compiled(keep_ratio=0.5)
    cache, plain = filled(f, 1), filled(tiny_llama.model(), 1)
    assert all(layer.where is None for layer in cache.layers)
    for m in (1, 1, 3):
        tokens = tiny_llama.prompt(m, seed=m)
        torch.testing.assert_close(
            decoded(f, cache, tokens), decoded(tiny_llama.model(), plain, tokens), atol=2e-5, rtol=1e-4
        )


def test_a_prompt_that_stays_dense():
    f = tiny_llama.compiled(min_tokens=1000)
    cache, plain = filled(f), filled(tiny_llama.model())
    tokens = tiny_llama.prompt(1, seed=3)
    torch.testing.assert_close(
        decoded(f, cache, tokens), decoded(tiny_llama.model(), plain, tokens), atol=2e-5, rtol=1e-4
    )
    assert all(layer.holds_every_token for layer in cache.layers)


def test_without_zipvl_it_is_transformers_own():
    x = inputs(batch=2, text=20, pad=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(model(), x, **STATIC)
    assert_same(got, run(model(), x))
    layer = cache_of(got).layers[0]
    assert layer.where is None and layer.is_compileable and layer.keys.shape[2] == 85 + NEW - 1
