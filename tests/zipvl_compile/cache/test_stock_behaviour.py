"""With the backend loaded and nothing compiled, the cache is transformers' own: every operation, compared with it."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_llava import inputs, model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.hf_names import as_argument, cache_of

HEADS, WIDTH = 2, 3


@dataclass
class Pair:
    """A layer of transformers and ours, which must not be told apart."""

    stock: DynamicLayer = field(default_factory=DynamicLayer)
    ours: DynamicLayer = field(default_factory=CompactLayer)
    count: int = 0

    def run(self, act):
        """Do the same to both: they return, raise and hold the same."""
        self.same(*self.results(act))
        for name in ("keys", "values", "is_initialized", "is_croppable", "is_sliding", "is_compileable"):
            self.same(getattr(self.stock, name), getattr(self.ours, name))
        for ask in (lambda x: x.get_seq_length(), lambda x: x.get_mask_sizes(3)):
            self.same(*self.results(ask))

    def results(self, act):
        """Return what an act gives, or raises, on each of the two."""
        for layer in (self.stock, self.ours):
            try:
                yield act(layer)
            except Exception as error:
                yield (type(error), str(error))

    def same(self, a, b):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        elif isinstance(a, tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                self.same(x, y)
        elif not isinstance(a, DynamicLayer):
            assert a == b

    def replace(self, make):
        self.stock, self.ours = make(self.stock), make(self.ours)

    def states(self, batch, tokens, dtype=torch.float32):
        self.count += 1
        shape = (batch, HEADS, tokens, WIDTH)
        return [torch.randn(shape, generator=torch.Generator().manual_seed(self.count), dtype=dtype) for _ in "kv"]


def update(pair, draw):
    keys, values = pair.states(draw(st.integers(1, 3)), draw(st.integers(0, 4)))
    pair.run(lambda layer: layer.update(keys, values))


def update_as_half_precision(pair, draw):
    keys, values = pair.states(draw(st.integers(1, 2)), 2, torch.bfloat16)
    pair.run(lambda layer: layer.update(keys, values))


def crop(pair, draw):
    n = draw(st.integers(-6, 2))
    pair.run(lambda layer: layer.crop(n))


def assign(pair, draw):
    cut = draw(st.sampled_from([slice(None), slice(0, 2), slice(1, None), slice(0, 0)]))
    which = draw(st.sampled_from([("keys", "values"), ("keys",), ("values",)]))

    def act(layer):
        for name in which:
            setattr(layer, name, getattr(layer, name)[:, :, cut])

    pair.run(act)


def assign_nothing(pair, draw):
    def act(layer):
        layer.keys = layer.values = None
        layer.is_initialized = False

    pair.run(act)


def write_into(pair, draw):
    def act(layer):
        layer.keys.mul_(2)
        layer.values[:, :, :1] = 5

    pair.run(act)


def select(pair, draw):
    rows = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
    pair.run(lambda layer: layer.batch_select_indices(rows))


def reorder(pair, draw):
    rows = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=1, max_size=3)))
    pair.run(lambda layer: layer.reorder_cache(rows))


def repeat(pair, draw):
    pair.run(lambda layer: layer.batch_repeat_interleave(2))


def reset(pair, draw):
    pair.run(lambda layer: layer.reset())


def initialize(pair, draw):
    keys, values = pair.states(1, 0)
    pair.run(lambda layer: layer.lazy_initialization(keys, values))


def offload_and_back(pair, draw):
    pair.run(lambda layer: layer.offload())
    pair.run(lambda layer: layer.prefetch())


def fork(pair, draw):
    """Go on with a copy, while the original grows on its own."""
    make = draw(st.sampled_from([copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    old = Pair(pair.stock, pair.ours)
    pair.replace(make)
    if old.stock.keys is not None and old.stock.get_seq_length():
        keys, values = pair.states(old.stock.keys.shape[0], 1)
        old.run(lambda layer: layer.update(keys, values))
    pair.run(lambda layer: None)


def rebuild(pair, draw):
    """Go on with a layer that is filled with what another one held."""

    def make(layer):
        new = type(layer)()
        if layer.keys is not None and layer.get_seq_length():
            new.update(layer.keys, layer.values)
        return new

    pair.replace(make)
    pair.run(lambda layer: None)


ACTS = [
    update, update, update, update_as_half_precision, crop, assign, assign_nothing, write_into, select, reorder, repeat,
    reset, initialize, offload_and_back, fork, rebuild,
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_sequence_of_operations_does_what_it_does_to_a_layer_of_transformers(data):
    pair = Pair()
    for act in data.draw(st.lists(st.sampled_from(ACTS), min_size=1, max_size=8)):
        act(pair, data.draw)


@pytest.fixture(scope="module")
def config():
    return model().config.get_text_config()


def filled(cache, tokens=4, batch=2):
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        cache.update(*(torch.randn(batch, 2, tokens, 16, generator=generator) for _ in "kv"), layer)
    return cache


def test_a_cache_is_iterated_and_rebuilt_from_its_pairs(config):
    cache = filled(DynamicCache(config=config))
    for again in (DynamicCache([pair[:2] for pair in cache], config=config), DynamicCache(list(cache))):
        assert again.get_seq_length() == 4 and len(again) == 2
        for old, new in zip(cache, again, strict=True):
            assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])


def test_early_initialization_has_no_tokens_and_takes_a_prompt(config):
    cache = DynamicCache(config=config)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    assert filled(cache).get_seq_length() == 4


def test_sizes_for_masks_and_kinds_of_layers(config):
    cache = filled(DynamicCache(config=config))
    assert cache.get_mask_sizes(3, 0) == (7, 0) and cache.get_max_length() == -1
    assert cache.is_sliding == [False, False] and not cache.is_compileable


def test_a_cache_is_stored_and_loaded(config):
    cache, file = filled(DynamicCache(config=config)), io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(cache, again, strict=True))


def test_the_gradient_flows_through_the_cache(config):
    cache = DynamicCache(config=config)
    keys = torch.randn(1, 2, 3, 16, requires_grad=True)
    out, _ = cache.update(keys, keys, 0)
    out, _ = cache.update(keys * 2, keys, 0)
    out.sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 3.0))


class Shortened:
    """What scripts do between two calls of an eager model, each compared with a cache of transformers' layers."""

    @staticmethod
    def by_assignment(cache):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :30], layer.values[:, :, :30]

    @staticmethod
    def by_crop(cache):
        cache.crop(-5)

    @staticmethod
    def by_evicting_the_middle(cache):
        for layer in cache.layers:
            kept = torch.cat([torch.arange(4), torch.arange(60, layer.keys.shape[2])])
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]

    @staticmethod
    def by_writing_zeros(cache):
        for layer in cache.layers:
            layer.keys[:, :, 3:9] = 0
            layer.values[:, :, 3:9].zero_()

    @staticmethod
    def not_at_all(cache):
        pass


@pytest.mark.parametrize("how", [name for name in vars(Shortened) if not name.startswith("_")])
def test_an_eager_model_continues_an_edited_cache_as_with_transformers_layers(how, config):
    f, x = model(), inputs(text=20)
    logits = []
    for layers in (DynamicLayer, CompactLayer):
        cache = DynamicCache(config=config)
        cache.layers = [layers() for _ in cache.layers]
        with torch.no_grad():
            f(**x, **as_argument(cache), use_cache=True)
            getattr(Shortened, how)(cache)
            out = f(input_ids=torch.tensor([[9, 10]]), **as_argument(cache), use_cache=True)
        assert cache_of(out) is cache
        logits.append((cache.get_seq_length(), out.logits))
    assert logits[0][0] == logits[1][0] and torch.equal(logits[0][1], logits[1][1])


def test_generate_without_compiling_is_what_it_was(config):
    f, x = model(), inputs(batch=2, text=12, pad=4)
    mapping = transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    ours = f.generate(**x, max_new_tokens=6, num_beams=2, do_sample=False)
    mapping["full_attention"] = DynamicLayer
    try:
        stock = f.generate(**x, max_new_tokens=6, num_beams=2, do_sample=False)
    finally:
        mapping["full_attention"] = CompactLayer
    assert torch.equal(ours, stock)
