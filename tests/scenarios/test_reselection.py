"""`reselect_every`: what is in memory is selected anew by the attention of the newest of the generated tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import tiny_llama
from support.selected_anew import Attention, chosen
from transformers import DynamicCache, LlamaConfig

import zipvl_compile
from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.kernels.other_tokens import other_tokens
from zipvl_compile.options import OptionError, ZipVLOptions
from zipvl_compile.report import compile_report

PROMPT, EVERY, ROWS, KEEP = 60, 10, 6, 24


def tokens(batch: int, n: int):
    """Return Q, K, V and the mask of n tokens in float64; of the second sample some are padding."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(batch, 4, n, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, 2, n, 16, generator=generator, dtype=torch.float64)
    shown = torch.ones(batch, n, dtype=torch.bool)
    shown[1:, :9] = False
    return q, k, v, torch.ones(n, n, dtype=torch.bool).tril() & shown[:, None, None], shown


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("evict", ["drop", "host"])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_the_selection_written_out(batch, evict, inner):
    """Float64: every step attends to what is in memory; after every tenth the best of it, or of all, stay."""
    n = PROMPT + 3 * EVERY
    q, k, v, mask, shown = tokens(batch, n)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    cache, f = DynamicCache(config=config), Attention()
    options = {"policy": "paper", "keep_tokens": KEEP, "min_tokens": 0, "recent_probes": 4, "random_probes": ROWS - 4}
    f.compile(backend="zipvl", options=options | {"reselect_every": EVERY, "evict": evict, "inner": inner})
    places = None
    with torch.no_grad():
        for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, n))]:
            part = [x[:, :, start:end] for x in (q, k, v)]
            out = f(*part, mask[:, :, start:end, :end], cache)
            (layer,) = cache.layers
            if start == 0:
                places = layer.positions[:, 0]
                continue
            places = torch.cat([places, torch.full((batch, 1), start)], 1)
            rows = places[:, None, :, None].expand(-1, 2, -1, 16)
            seen = mask[:, :, start:end, :end].expand(batch, -1, -1, -1).gather(3, places[:, None, None])
            expected = F.scaled_dot_product_attention(
                part[0], k.gather(2, rows), v.gather(2, rows), attn_mask=seen, enable_gqa=True
            )
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
            if (end - PROMPT) % EVERY == 0:
                if evict == "host":
                    places = torch.arange(end).expand(batch, -1)
                rows = places[:, None, :, None].expand(-1, 2, -1, 16)
                kept = chosen(q[:, :, end - ROWS : end], k.gather(2, rows), places, shown, KEEP)
                places = places.gather(1, kept)
                assert layer.cached_length == KEEP and layer.prompt_length == end
            rows = places[:, None, :, None].expand(-1, 2, -1, 16)
            assert torch.equal(layer.cached_positions[:, 0], places)
            assert torch.equal(layer.keys, k.gather(2, rows)) and torch.equal(layer.values, v.gather(2, rows))
    came_back = evict == "host" and not {*places[0].tolist()} <= {*range(PROMPT - 4, n)}
    assert evict == "drop" or came_back


def greedy(f, count, ids, cache=None):
    """Return the tokens and the cache of a loop of one's own, and how much each layer held after every step."""
    held, said = [], []
    with torch.no_grad():
        out = f(input_ids=ids, **({} if cache is None else as_argument(cache)), use_cache=True)
        cache = cache_of(out)
        for _ in range(count):
            said.append(out.logits[:, -1].argmax(-1))
            out = f(input_ids=said[-1][:, None], **as_argument(cache))
            held.append([layer.cached_length for layer in cache.layers])
    return torch.stack(said, 1), cache, held


BOUNDED = {"keep_tokens": 40, "reselect_every": 16, "recent_probes": 8, "random_probes": 0}


def test_a_long_generation_has_a_bounded_cache_and_compiles_nothing_after_the_second_time():
    torch._dynamo.reset()
    f = tiny_llama.compiled(**BOUNDED)
    with compile_report.collect() as reports:
        _, cache, held = greedy(f, 36, tiny_llama.prompt(150))
        graphs = len(reports)
        _, cache, more = greedy(f, 100, tiny_llama.prompt(150, seed=1))
        assert len(reports) == graphs
    assert all(40 <= tokens < 40 + 16 for step in held + more for tokens in step)
    assert all(layer.get_seq_length() == 250 for layer in cache.layers)
    assert all(buffer.shape[2] <= 40 + 16 + 32 for layer in cache.layers for buffer in (layer.key_buffer,))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("evict", ["drop", "host"])
def test_where_everything_is_kept_the_tokens_are_those_of_the_model(evict, batch):
    ids, count = tiny_llama.prompt(100, batch), 40
    expected, *_ = greedy(tiny_llama.model(), count, ids)
    f = tiny_llama.compiled(keep_tokens=1000, reselect_every=9, evict=evict)
    said, cache, _ = greedy(f, count, ids)
    assert torch.equal(said, expected)
    assert cache.layers[0].prompt_length == 100 + 36 and cache.layers[0].cached_length == 140


@pytest.mark.parametrize("batch", [1, 2])
def test_a_later_turn_and_reselections_lose_no_token(batch):
    """The first layer's keys depend on the tokens alone: in memory and on the host are those of the whole sequence."""
    f = tiny_llama.compiled(**BOUNDED, evict="host")
    ids, turn = tiny_llama.prompt(150, batch), tiny_llama.prompt(140, batch, seed=1)
    said, cache, _ = greedy(f, 20, ids)
    more, cache, held = greedy(f, 20, turn, cache)
    whole = torch.cat([ids, said, turn, more], 1)
    layer, n = cache.layers[0], whole.shape[1]
    assert layer.get_seq_length() == n == 330 and layer.prompt_length == 326
    assert held[0] == [41, 41] and layer.cached_length == 44
    others = other_tokens(layer.positions, layer.prompt_length)
    found = torch.zeros(batch, 2, n, 16)
    for places, keys in ((layer.cached_positions[:, 0], layer.keys), (others[:, 0], layer.other_keys)):
        found.scatter_(2, places[:, None, :, None].expand_as(keys), keys)
    with torch.no_grad():
        expected = cache_of(tiny_llama.model()(input_ids=whole, use_cache=True)).layers[0].keys
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_generate_in_every_mode():
    f = tiny_llama.compiled(**BOUNDED)
    ids = tiny_llama.prompt(90, 2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    plain = f.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    loop = tiny_llama.compiled(**BOUNDED)
    assert plain.shape == (2, 130)
    one = greedy(loop, 40, ids[:1])[0]
    assert torch.equal(plain[:1, 90:], one)  # the other sample's padding does not change this one
    beams = f.generate(ids, attention_mask=mask, max_new_tokens=40, num_beams=3, do_sample=False)
    assert beams.shape == (2, 130)
    drafts = f.generate(ids[:1], max_new_tokens=40, prompt_lookup_num_tokens=4, do_sample=False)
    assert drafts.shape == (1, 130)


@pytest.mark.parametrize("copied", [copy.deepcopy, zipvl_compile.fork], ids=["deepcopy", "fork"])
@pytest.mark.parametrize("evict", ["drop", "host"])
def test_a_copy_goes_on_as_the_cache_itself_does(copied, evict):
    """In the middle of a cycle: the queries that are kept are its own."""
    f = tiny_llama.compiled(**BOUNDED, evict=evict)
    _, cache, _ = greedy(f, 9, tiny_llama.prompt(120))
    other, third = copied(cache), copy.deepcopy(cache)
    ids, noise = tiny_llama.prompt(1, seed=7), tiny_llama.prompt(1, seed=8)
    greedy(f, 6, noise, cache)
    said, other, _ = greedy(f, 20, ids, other)
    expected, third, _ = greedy(f, 20, ids, third)
    assert torch.equal(said, expected)
    assert all(map(torch.equal, (x.positions for x in other.layers), (x.positions for x in third.layers)))


def test_a_fixed_fraction_of_what_is_left_is_refused():
    with pytest.raises(OptionError, match=r"'reselect_every'.*keep_tokens.*got keep_ratio=0.5"):
        ZipVLOptions.parse({"keep_ratio": 0.5, "reselect_every": 100})
    ZipVLOptions.parse({"keep_ratio": 0.5, "reselect_every": 100, "evict": "host"})


def test_a_static_cache_says_that_it_cannot():
    f = tiny_llama.compiled(**BOUNDED)
    with pytest.raises(ValueError, match="static cache, got evict='drop' and reselect_every=16"):
        f.generate(tiny_llama.prompt(90), max_new_tokens=4, cache_implementation="static")
