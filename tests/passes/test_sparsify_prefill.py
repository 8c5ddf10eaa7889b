"""Prefill pass: what matches, what it becomes, what must not match and why, and that the numbers are the paper's."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import REPEATS, Wrapped
from support.recording import Noted
from torch import nn

from zipvl_compile.passes import sparsify_prefill
from zipvl_compile.passes.graph import graph as graph_edits
from zipvl_compile.passes.prefill import refusals

NAME = "(scaled_dot_product_attention)"
ADDED = Counter(
    {
        "zipvl.token_scores": 1,
        "getitem": 2,
        "zipvl.select_tokens": 1,
        "zipvl.gather_tokens": 2,
        "zipvl.sparse_attention": 1,
    }
)
CACHE = Counter({"zipvl.token_positions": 1, "zipvl.gather_tokens": 2})
SDPA = Counter({"scaled_dot_product_attention": 1})
WITH_WINDOW = ADDED - Counter({"zipvl.sparse_attention": 1}) + Counter({"zipvl.window_attention": 1})


def outcomes(recorder, graph=0):
    return [(one.kind, one.reason) for one in recorder.noted("prefill", graph)]


def assert_untouched(recorder, reason, graph=0):
    """Check that the site was considered, refused for that reason, and that the graph is as it was."""
    assert outcomes(recorder, graph) == [("prefill", reason)]
    assert not recorder.erased[graph] and not recorder.added[graph]


def padded(batch, n):
    real = torch.ones(batch, n, dtype=torch.bool)
    real[1:, : n // 3] = False
    return torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, None]


@pytest.mark.parametrize("form", REPEATS)
def test_one_site_in_every_head_form(record, modules, by_the_paper, form):
    q, k, v = modules.qkv(kv_heads=4 if form == "plain" else 2)
    (out, keys, values, kept), recorder = record(modules.Prefill(form, is_causal=True), q, k, v)
    assert recorder.noted("prefill") == [Noted(NAME, "prefill")]
    assert recorder.added[0] == ADDED
    assert recorder.erased[0] == CACHE + SDPA + REPEATS[form]
    exact, positions = by_the_paper(q, k, v)
    p = positions.shape[2]
    assert p < 20 and np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    assert keys.shape == (2, k.shape[1], p + modules.SPARE, 8) and values.shape == (2, k.shape[1], p + modules.SPARE, 6)
    assert torch.equal(keys[:, :, :p], k.gather(2, kept[..., None].expand(-1, k.shape[1], -1, 8)))
    assert torch.equal(values[:, :, :p], v.gather(2, kept[..., None].expand(-1, k.shape[1], -1, 6)))


@pytest.mark.parametrize("form", [*REPEATS, "expand-view"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padding"])
def test_tau_1_changes_nothing_but_the_graph(record, modules, form, masked):
    q, k, v = modules.qkv(kv_heads=4 if form == "plain" else 2)
    mask = padded(2, 20) if masked else None
    module = modules.Prefill(form, is_causal=not masked, scale=0.3)
    before, plain = record(module, q, k, v, mask, passes=False)
    after, recorder = record(module, q, k, v, mask, tau=1.0)
    assert not plain.added[0]
    if form != "expand-view":  # `contiguous` between expand and view is another form: it stays dense, and says so
        assert recorder.added[0] == ADDED
    assert torch.equal(after[0], before[0])
    for new, old in zip(after[1:3], before[1:3], strict=True):
        assert torch.equal(new[:, :, :20], old[:, :, :20]) and new.shape == old.shape
    assert torch.equal(after[3], before[3])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("unselected", ["zero", "hold", "all", "window", "kept and window", "union"])
@pytest.mark.parametrize("mask", ["none", "padding", "padding-per-head", "additive", "broadcast-batch"])
def test_masks_scale_and_queries_reach_the_operators(record, modules, by_the_paper, mask, unselected, dynamic):
    q, k, v = modules.qkv(seed=1)
    given = {
        "none": None,
        "padding": padded(2, 20),
        "padding-per-head": padded(2, 20).repeat(1, 4, 1, 1),
        "additive": torch.zeros(2, 1, 20, 20).double().masked_fill(~padded(2, 20), float("-inf")),
        "broadcast-batch": padded(2, 20)[:1],
    }[mask]
    rule = {"unselected": unselected, "window": 3, "sinks": 2}
    if unselected == "kept and window":
        rule |= {"unselected": "window", "kept_window": True}
    if unselected == "union":
        rule |= {"unselected": "all", "kept_window": True}
    module = modules.Packed(modules.Prefill(is_causal=given is None, scale=0.5), q, k, v)
    (out, *_, kept), recorder = record(module, modules.pack(q, k, v), given, dynamic=dynamic, **rule)
    assert recorder.added[0] == (WITH_WINDOW if "window" in unselected or unselected == "union" else ADDED)
    exact, positions = by_the_paper(q, k, v, mask=given, is_causal=given is None, scale=0.5, **rule)
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padding"])
@pytest.mark.parametrize(
    "rule",
    [{}, {"unselected": "hold"}, {"unselected": "all"}, {"unselected": "window", "window": 3, "sinks": 2},
     {"unselected": "all", "kept_window": True, "window": 3, "sinks": 2}, {"score": "value"}, {"score": "random"},
     {"pooling": 3}],
    ids=str,
)  # fmt: skip
def test_each_kv_head_keeps_tokens_of_its_own(record, modules, by_the_paper, rule, padding, dynamic):
    q, k, v = modules.qkv(seed=1)
    mask = padded(2, 20) if padding else None
    module = modules.Packed(modules.Prefill(is_causal=not padding), q, k, v)
    (out, keys, values, kept), recorder = record(
        module, modules.pack(q, k, v), mask, dynamic=dynamic, groups="kv_head", **rule
    )
    assert outcomes(recorder) == [("prefill", "")]
    assert kept.shape[:2] == k.shape[:2]
    drawn = rule.get("score") == "random"  # the same numbers for every head
    assert drawn or any(not torch.equal(one[0], one[1]) for one in kept)
    p = kept.shape[2]
    for cached, x in ((keys, k), (values, v)):
        assert torch.equal(cached[:, :, :p], x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[3])))
    if not rule.keys() & {"score", "pooling"}:
        exact, positions = by_the_paper(q, k, v, mask=mask, is_causal=not padding, groups="kv_head", **rule)
        assert np.array_equal(kept.numpy(), positions)
        np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changed",
    [
        {"tau": 0.5},
        {"keep_ratio": 0.3},
        {"keep_tokens": 4},
        {"floor": 0.9},
        {"keep_recent": 7},
        {"keep_first": 5},
        {"recent_probes": 3, "random_probes": 2, "seed": 9},
    ],
    ids=str,
)  # fmt: skip
def test_every_selection_option_reaches_the_operators(record, modules, by_the_paper, changed):
    q, k, v = modules.qkv(seed=2)
    (out, *_, kept), _ = record(modules.Prefill(is_causal=True), q, k, v, **changed)
    exact, positions = by_the_paper(q, k, v, **changed)
    default = by_the_paper(q, k, v)[1]
    assert not np.array_equal(positions, default), "the option must matter in this case"
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", REPEATS)
def test_evict_keep_leaves_the_cache_full_and_the_attention_sparse(record, modules, by_the_paper, form):
    q, k, v = modules.qkv(kv_heads=4 if form == "plain" else 2)
    (out, keys, values, kept), recorder = record(modules.Prefill(form, is_causal=True), q, k, v, evict="keep")
    assert recorder.added[0] == ADDED
    assert recorder.erased[0] == SDPA + REPEATS[form], "the cache's own nodes stay"
    exact, positions = by_the_paper(q, k, v)
    assert positions.shape[2] < 20
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(keys[:, :, :20], k) and torch.equal(values[:, :, :20], v)
    assert kept.tolist() == [[list(range(20))]] * 2
    assert recorder.noted("others") == []


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_rewritten_graph_compiles_further(record, modules, by_the_paper, inner):
    q, k, v = modules.qkv()
    module = modules.Packed(modules.Prefill("expand", is_causal=True), q, k, v)
    (out, *_, kept), _ = record(module, modules.pack(q, k, v), inner=inner, dynamic=True)
    exact, positions = by_the_paper(q, k, v)
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


def test_head_dim_may_be_symbolic(record, modules, by_the_paper):
    q, k, v = modules.qkv()
    (out, *_, kept), _ = record(modules.Prefill(is_causal=True), q, k, v, inner="eager", dynamic=True)
    exact, positions = by_the_paper(q, k, v)
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("evict", ["drop", "keep"])
@pytest.mark.parametrize("form", ["enable_gqa", "expand"])
def test_every_layer_of_a_decoder_is_named_and_chooses_its_own_tokens(record, modules, by_the_paper, form, evict):
    torch.manual_seed(0)
    model = modules.Decoder(form).double().eval()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    (out, caches), recorder = record(model, x, evict=evict)
    sites = recorder.noted("prefill")
    assert sites == [Noted(f"layers.{i}", "prefill") for i in range(3)]
    assert recorder.added[0] == Counter({name: 3 * count for name, count in ADDED.items()})
    assert recorder.noted("others") == []
    hidden, lengths = x, []
    for layer, (keys, _, kept) in zip(model.layers, caches, strict=True):
        q, k, v = (
            projection(hidden).unflatten(2, (heads, -1)).transpose(1, 2)
            for projection, heads in ((layer.q, 4), (layer.k, 2), (layer.v, 2))
        )
        exact, positions = by_the_paper(q * layer.peak, k, v)
        lengths.append(positions.shape[2])
        if evict == "drop":
            assert np.array_equal(kept.numpy(), positions)
        assert keys.shape[2] == (positions.shape[2] if evict == "drop" else 20) + modules.SPARE
        hidden = hidden + layer.o(torch.from_numpy(exact).transpose(1, 2).flatten(2))
    assert len(set(lengths)) > 1, "the case must need different counts"
    torch.testing.assert_close(out, hidden, rtol=1e-11, atol=1e-11)


def test_tau_1_through_a_whole_decoder(record, modules):
    torch.manual_seed(0)
    model = modules.Decoder("expand").double().eval()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    (out, _), recorder = record(model, x, tau=1.0)
    assert len(recorder.noted("prefill")) == 3
    torch.testing.assert_close(out, model(x)[0], rtol=1e-12, atol=1e-12)


def test_later_prompts_of_other_lengths_do_not_recompile(record, modules, by_the_paper):
    first = modules.qkv(20)
    module = modules.Packed(modules.Prefill(is_causal=True), *first)
    _, recorder = record(module, modules.pack(*first), dynamic=True)
    for n in (33, 21, 40):
        q, k, v = modules.qkv(n, seed=n)
        out, *_, kept = recorder.compiled(modules.pack(q, k, v))
        exact, positions = by_the_paper(q, k, v)
        assert np.array_equal(kept.numpy(), positions)
        np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    assert len(recorder.graphs) == 1


def test_min_tokens_is_a_guard_and_not_a_decision_for_ever(record, modules, by_the_paper):
    q, k, v = modules.qkv(20)
    module = modules.Packed(modules.Prefill(is_causal=True), q, k, v)
    (out, keys, _, kept), recorder = record(module, modules.pack(q, k, v), dynamic=True, min_tokens=32)
    assert_untouched(recorder, "prompt shorter than min_tokens=32")
    assert kept.shape[2] == 20 and keys.shape[2] == 24
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    for n, sparse in ((40, True), (31, False), (32, True), (25, False), (50, True)):
        q, k, v = modules.qkv(n, seed=n)
        out, *_, kept = recorder.compiled(modules.pack(q, k, v))
        if sparse:
            exact, positions = by_the_paper(q, k, v)
            assert np.array_equal(kept.numpy(), positions)
            np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
        else:
            assert kept.shape[2] == n
            torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert len(recorder.graphs) == 2, "one dense graph and one sparse graph serve every length"


def test_dropout_stays_dense(record, modules):
    _, recorder = record(modules.Prefill(dropout_p=0.25, is_causal=True), *modules.qkv())
    assert_untouched(recorder, "attention dropout 0.25: the model is training")


def test_fewer_queries_than_keys_stay_dense(record, modules):
    q, k, v = modules.qkv()
    _, recorder = record(modules.Prefill(), q[:, :, :5], k, v)
    assert_untouched(recorder, "5 queries over 20 keys: not the prefill of a whole prompt")


def test_one_query_is_not_a_sign_of_decode(record, modules):
    """A last KV-shared layer may ask for the newest row only: dense, and never rewritten as decode."""
    q, k, v = modules.qkv()
    _, recorder = record(modules.Prefill(), q[:, :, -1:], k, v)
    assert_untouched(recorder, "1 queries over 20 keys: not the prefill of a whole prompt")
    assert recorder.noted("decode") == []


def test_broadcast_batch_of_keys_stays_dense(record, modules):
    q, k, v = modules.qkv()
    _, recorder = record(modules.Prefill("plain"), q, k[:1].repeat(1, 2, 1, 1), v[:1].repeat(1, 2, 1, 1))
    assert_untouched(recorder, "batch 2 of queries over batch 1 of keys")


def test_prompt_of_one_token_stays_dense(record, modules):
    _, recorder = record(modules.Prefill(is_causal=True), *modules.qkv(1))
    assert_untouched(recorder, "prompt of one token")


def test_attention_in_both_directions_without_a_mask_stays_dense(record, modules):
    """A cache of cross-attention whose encoder happens to be as long as the prompt."""
    _, recorder = record(modules.Prefill(), *modules.qkv())
    assert_untouched(recorder, str(refusals.NOT_CAUSAL))


def test_mask_of_another_form_stays_dense(record, modules):
    mask = torch.ones(1, 1, 20, 1, dtype=torch.bool)
    _, recorder = record(modules.Prefill(), *modules.qkv(), mask)
    assert_untouched(recorder, "mask of shape [1, 1, 20, 1] is not [batch, heads, queries, keys]")


@pytest.mark.parametrize("shape", [(20, 20), (1, 20, 20), (2, 1, 1, 20)], ids=str)
def test_masks_with_fewer_axes_or_one_row_are_read(record, modules, by_the_paper, shape):
    q, k, v = modules.qkv(seed=3)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    (out, *_, kept), recorder = record(modules.Prefill(), q, k, v, mask)
    assert outcomes(recorder) == [("prefill", "")]
    exact, positions = by_the_paper(q, k, v, mask=mask.expand(2, 1, 20, 20), is_causal=False)
    assert np.array_equal(kept.numpy(), positions) and positions.shape[2] < 20
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


class SharedKV(nn.Module):
    """Two attentions over one cache layer, the second with all queries or the newest `rows` only."""

    def __init__(self, modules, rows=None, **second):
        super().__init__()
        self.modules, self.rows, self.second = modules, rows, second

    def forward(self, q, k, v):
        first = self.modules.attend(q, k, v, is_causal=True)
        newest = q if self.rows is None else q[:, :, -self.rows :]
        second = self.modules.attend(newest * 2, k, v, **self.second)
        return first, second, *self.modules.cache(k, v)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("evict", ["drop", "keep"])
def test_attentions_that_share_a_cache_share_its_kept_tokens(record, modules, by_the_paper, paper, evict, dynamic):
    q, k, v = modules.qkv()
    module = modules.Packed(SharedKV(modules, is_causal=True), q, k, v)
    (first, second, keys, _, kept), recorder = record(module, modules.pack(q, k, v), dynamic=dynamic, evict=evict)
    assert outcomes(recorder) == [("prefill", "")] * 2
    exact, positions = by_the_paper(q, k, v)
    assert positions.shape[2] < 20
    np.testing.assert_allclose(first.numpy(), exact, rtol=1e-12, atol=1e-12)
    exact = paper.attention(q * 2, k, v, positions, queries="selected", mask=None, is_causal=True, scale=None)
    np.testing.assert_allclose(second.numpy(), exact, rtol=1e-12, atol=1e-12)
    if evict == "drop":
        assert np.array_equal(kept.numpy(), positions) and keys.shape[2] == positions.shape[2] + modules.SPARE
    else:
        assert kept.shape[2] == 20 and torch.equal(keys[:, :, :20], k)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_sharing_attention_of_the_newest_query_reads_the_kept_tokens(record, modules, by_the_paper, paper, dynamic):
    q, k, v = modules.qkv()
    module = modules.Packed(SharedKV(modules, rows=1), q, k, v)
    (_, second, *_), recorder = record(module, modules.pack(q, k, v), dynamic=dynamic)
    assert outcomes(recorder) == [("prefill", "")] * 2
    assert recorder.added[0]["zipvl.decode_attention"] == 1
    _, positions = by_the_paper(q, k, v)
    exact = paper.attention(q * 2, k, v, positions, queries="all", mask=None, is_causal=True, scale=None)
    np.testing.assert_allclose(second.numpy(), exact[:, :, -1:], rtol=1e-12, atol=1e-12)


def test_a_sharing_attention_of_few_queries_keeps_its_own_mask(record, modules, by_the_paper, paper):
    """Its mask counts from the first query: a triangle that is no causal mask of the newest tokens."""
    q, k, v = modules.qkv()
    mask = torch.ones(3, 20, dtype=torch.bool).tril(10)
    module = modules.Packed(Wrapped(lambda q, k, v: shared_with_mask(modules, q, k, v)), q, k, v)
    (_, second, _), recorder = record(module, modules.pack(q, k, v))
    assert outcomes(recorder) == [("prefill", "")] * 2
    _, positions = by_the_paper(q, k, v)
    exact = paper.decode(q[:, :, -3:] * 2, k, v, positions, 20, mask=mask[None, None])
    np.testing.assert_allclose(second.numpy(), exact, rtol=1e-12, atol=1e-12)


def shared_with_mask(modules, q, k, v):
    first = modules.attend(q, k, v, is_causal=True)
    places = torch.arange(20)[None] <= torch.arange(3)[:, None] + 10
    return first, modules.attend(q[:, :, -3:] * 2, k, v, attn_mask=places), modules.cache(k, v)


def test_sharing_attention_with_a_misaligned_causal_flag_stays_dense(record, modules):
    module = SharedKV(modules, rows=5, is_causal=True)
    _, recorder = record(module, *modules.qkv())
    assert outcomes(recorder) == [
        ("prefill", ""),
        ("prefill", "is_causal aligns queries with the first keys, not with the last"),
    ]


def test_nothing_is_shared_with_a_first_attention_that_stays_dense(record, modules):
    def shared(q, k, v):
        first = modules.attend(q, k, v, is_causal=True, dropout_p=0.25)
        return first, modules.attend(q * 2, k, v, is_causal=True), modules.cache(k, v)

    _, recorder = record(Wrapped(shared), *modules.qkv())
    assert outcomes(recorder) == [
        ("prefill", "attention dropout 0.25: the model is training"),
        ("prefill", "shared KV: the first attention over this layer's cache stays dense"),
    ]
    assert not recorder.erased[0] and not recorder.added[0]


def test_cache_that_is_read_again_stays_dense(record, modules):
    def read_again(q, k, v):
        keys, values, kept = modules.cache(k, v)
        return modules.attend(q, k, v, is_causal=True), keys, values, kept, keys.sum()

    _, recorder = record(Wrapped(read_again), *modules.qkv())
    assert_untouched(recorder, "the layer's cache is read again in the same graph")


def test_positions_that_are_read_again_stay_dense(record, modules):
    def read_again(q, k, v):
        keys, values, kept = modules.cache(k, v)
        return modules.attend(q, k, v, is_causal=True), keys, values, kept + 1

    _, recorder = record(Wrapped(read_again), *modules.qkv())
    assert_untouched(recorder, "the layer's cache is read again in the same graph")


def not_the_cached_key(modules, q, k, v):
    return modules.attend(q, k * 1.5, v, is_causal=True), modules.cache(k, v)


def not_the_cached_value(modules, q, k, v):
    return modules.attend(q, k, v + 1, is_causal=True), modules.cache(k, v)


def repeated_along_another_axis(modules, q, k, v):
    wide = [x[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 4, 20, -1) for x in (k, v)]  # heads 0 1 0 1, not 0 0 1 1
    return F.scaled_dot_product_attention(q, *wide, is_causal=True), modules.cache(k, v)


def repeated_along_the_tokens(modules, q, k, v):
    wide = [x.repeat_interleave(2, dim=2).reshape(2, 4, 20, -1) for x in (k, v)]
    return F.scaled_dot_product_attention(q, *wide, is_causal=True), modules.cache(k, v)


def expanded_heads_folded_into_tokens(modules, q, k, v):
    wide = [x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 2, 40, -1) for x in (k, v)]
    return F.scaled_dot_product_attention(torch.cat([q, q], 2)[:, :2], *wide), modules.cache(k, v)


def written_after_the_cache(modules, q, k, v):
    """The model changes its repeated keys: the attention does not read what the cache holds."""
    wide = k.repeat_interleave(2, dim=1)
    wide[:, :, 0] = 0
    return F.scaled_dot_product_attention(q, wide, v.repeat_interleave(2, dim=1), is_causal=True), modules.cache(k, v)


def values_of_another_layer(modules, q, k, v):
    v2 = v + 1
    return modules.attend(q, k, v2, is_causal=True), modules.cache(k, v), modules.cache(k + 1, v2)


COMPUTED_BY_TOKEN = [not_the_cached_key, not_the_cached_value, repeated_along_another_axis]


@pytest.mark.parametrize("computed", COMPUTED_BY_TOKEN, ids=lambda function: function.__name__)
def test_what_is_computed_from_the_cached_tensors_token_by_token_is_rewritten(record, modules, computed):
    """The kept rows of what the attention reads are computed from the kept rows of the cache, as decode will do."""
    inputs = modules.qkv()
    module = Wrapped(lambda q, k, v: computed(modules, q, k, v))
    (out, _), recorder = record(module, *inputs, tau=1.0)
    torch.testing.assert_close(out, module(*inputs)[0], rtol=1e-12, atol=1e-12)
    assert outcomes(recorder) == [("prefill", "")]
    torch._dynamo.reset()
    (out, (keys, _, kept)), recorder = record(module, *inputs, tau=0.8)
    p = kept.shape[2]
    assert p < 20 and torch.equal(keys[:, :, :p], inputs[1].gather(2, kept[..., None].expand(-1, 2, -1, 8)))
    assert (out.abs().sum((1, 3)) > 0).sum(1).tolist() == [p, p], "kept queries, and no others, get an output"


NEAR_MISSES = [
    repeated_along_the_tokens,
    expanded_heads_folded_into_tokens,
    written_after_the_cache,
    values_of_another_layer,
]


@pytest.mark.parametrize("near_miss", NEAR_MISSES, ids=lambda function: function.__name__)
def test_near_miss_does_not_match(record, modules, near_miss):
    inputs = modules.qkv()
    module = Wrapped(lambda q, k, v: near_miss(modules, q, k, v))
    expected = module(*inputs)[0]
    (out, *_), recorder = record(module, *inputs, tau=1.0)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert outcomes(recorder) == []
    assert not recorder.erased[0] and not recorder.added[0]


def test_keys_changed_in_place_between_cache_and_attention(record, modules):
    """The pass moves the copy into the cache down to the attention; it must not pass a write to what it copies."""

    def rotate_in_place(q, k, v):
        k = k + 0
        stored = modules.cache(k, v)
        k.mul_(2)
        return modules.attend(q, k, v, is_causal=True), *stored

    q, k, v = modules.qkv()
    (out, keys, _values, _kept), _ = record(Wrapped(rotate_in_place), q, k, v, tau=1.0)
    assert torch.equal(out, modules.attend(q, k * 2, v, is_causal=True, scale=8**-0.5))
    assert torch.equal(keys[:, :, :20], k), "the cache holds the keys as they were when the model cached them"


def test_heads_repeated_before_the_cache(record, modules, by_the_paper):
    """Some models cache keys that they have already repeated; the site is the same attention with more KV heads."""

    def repeat_first(q, k, v):
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), *modules.cache(k, v)

    q, k, v = modules.qkv()
    (out, keys, _, kept), recorder = record(Wrapped(repeat_first), q, k, v)
    assert outcomes(recorder) == [("prefill", "")]
    exact, positions = by_the_paper(q, k, v)
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    assert keys.shape[:2] == (2, 4)


def test_what_looks_dead_survives(record, modules, by_the_paper):
    """In-place calls have no users; erasing them breaks models without a word."""

    def in_place(q, k, v):
        q, mask = q.clone(), torch.zeros(2, 1, 20, 20, dtype=torch.bool)
        mask.logical_not_()
        mask[1, :, :, :5] = False
        q.scatter_(2, torch.zeros(2, 4, 1, 8, dtype=torch.int64), 1.0)
        mask.logical_and_(torch.ones(20, 20, dtype=torch.bool).tril())
        stored = modules.cache(k, v)
        out = modules.attend(q, k, v, "expand", attn_mask=mask)
        out.mul_(3)
        return out, *stored

    q, k, v = modules.qkv()
    (out, *_, kept), recorder = record(Wrapped(in_place), q, k, v)
    assert recorder.erased[0] == CACHE + SDPA + REPEATS["expand"]
    names = {node.target if isinstance(node.target, str) else node.target.__name__ for node in recorder.graphs[0].nodes}
    assert {"logical_not_", "logical_and_", "scatter_", "setitem", "mul_"} <= names
    mask = torch.ones(20, 20, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :5] = False
    q = q.clone()
    q[:, :, 0] = 1.0
    exact, positions = by_the_paper(q, k, v, mask=mask, is_causal=False)
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact * 3, rtol=1e-12, atol=1e-12)


def test_repeated_keys_that_something_else_reads_survive(record, modules, by_the_paper):
    def also_summed(q, k, v):
        stored = modules.cache(k, v)
        wide = modules.repeat(k, 2, "expand")
        out = F.scaled_dot_product_attention(q, wide, modules.repeat(v, 2, "expand"), is_causal=True)
        return out, wide.sum(), *stored

    q, k, v = modules.qkv()
    (out, total, *_), recorder = record(Wrapped(also_summed), q, k, v)
    assert recorder.erased[0] == CACHE + SDPA + Counter({"getitem": 1, "expand": 1, "reshape": 1})
    torch.testing.assert_close(total, 2 * k.sum())
    np.testing.assert_allclose(out.numpy(), by_the_paper(q, k, v)[0], rtol=1e-12, atol=1e-12)


def test_vision_tower_beside_the_decoder_stays_dense(record, modules, by_the_paper):
    def both(q, k, v, a):
        seen = F.scaled_dot_product_attention(a, a, a)
        stored = modules.cache(k, v)
        return modules.attend(q, k, v, is_causal=True), seen, *stored

    q, k, v = modules.qkv()
    a = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    (out, seen, *_), recorder = record(Wrapped(both), q, k, v, a)
    assert outcomes(recorder) == [("prefill", "")]
    assert recorder.erased[0] == CACHE + SDPA
    torch.testing.assert_close(seen, F.scaled_dot_product_attention(a, a, a))
    np.testing.assert_allclose(out.numpy(), by_the_paper(q, k, v)[0], rtol=1e-12, atol=1e-12)


def test_a_latent_that_is_both_key_and_value(record, modules, by_the_paper):
    def latent(q, k):
        return modules.attend(q, k, k, is_causal=True), *modules.cache(k, k)

    q, k, _ = modules.qkv()
    (out, keys, values, kept), recorder = record(Wrapped(latent), q, k)
    assert outcomes(recorder) == [("prefill", "")]
    exact, positions = by_the_paper(q, k, k)
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    p = positions.shape[2]
    assert torch.equal(keys[:, :, :p], values[:, :, :p])
    assert keys.data_ptr() != values.data_ptr(), "decode writes into both buffers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_keeps_its_dtype(record, modules, dtype):
    q, k, v = modules.qkv(dtype=dtype)
    (out, keys, values, kept), _ = record(modules.Prefill(is_causal=True), q, k, v)
    assert out.dtype == keys.dtype == values.dtype == dtype and kept.dtype == torch.int64
    assert 0 < kept.shape[2] < 20


def counting(asked, least=0):
    """Return a cost model that notes which attention it was asked about."""

    def min_tokens(shape, dtype, device):
        asked.append((shape, dtype, device.type))
        return least

    return min_tokens


def test_the_cost_model_is_asked_about_every_site_that_could_be_rewritten(record, modules):
    asked = []
    _, recorder = record(modules.Prefill(is_causal=True), *modules.qkv(), min_tokens=counting(asked))
    (site,) = recorder.sites[0].prefill
    assert site.rewritten and asked == [(site.shape, torch.float64, "cpu")]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_nothing_is_measured_and_nothing_guarded_for_a_site_that_stays_dense_anyway(record, modules, dynamic):
    asked = []
    q, k, v = modules.qkv()
    module = modules.Packed(modules.Prefill(dropout_p=0.25, is_causal=True), q, k, v)
    _, recorder = record(module, modules.pack(q, k, v), min_tokens=counting(asked, 32), dynamic=dynamic)
    ((kind, reason),) = outcomes(recorder)
    assert kind == "prefill" and reason.startswith("attention dropout") and not asked
    q, k, v = modules.qkv(40)
    recorder.compiled(modules.pack(q, k, v))
    assert len(recorder.graphs) == (1 if dynamic else 2), "no guard on the length, no compile for another one"


def test_further_readers_of_a_layer_are_not_measured(record, modules):
    asked = []
    _, recorder = record(SharedKV(modules, is_causal=True), *modules.qkv(), min_tokens=counting(asked))
    assert [site.rewritten for site in recorder.sites[0].prefill] == [True, True] and len(asked) == 1


@pytest.mark.parametrize("broken", ["select", "attend", "shape_of", "refusal"])
def test_a_fault_of_ours_leaves_the_site_dense_with_a_reason(record, modules, monkeypatch, broken):
    def fail(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(sparsify_prefill, broken, fail)
    q, k, v = modules.qkv()
    module = modules.Prefill(is_causal=True)
    if broken == "attend":  # after the cache was compacted: the runner of the passes undoes the whole pass
        with pytest.raises(Exception, match="a fault of ours"):
            record(module, q, k, v)
        return
    (out, *_), recorder = record(module, q, k, v)
    (noted,) = recorder.noted("prefill")
    assert "zipvl failed on it (RuntimeError: a fault of ours)" in noted.reason
    assert not recorder.added[0] and not recorder.erased[0]
    torch.testing.assert_close(out, module(q, k, v)[0])


def test_an_operator_whose_fake_fails_leaves_no_trace(record, modules, monkeypatch):
    """What `propagate` raises in the middle of an insertion is undone."""
    real = graph_edits.propagate

    def fail(node):
        if "gather_tokens" in str(node.target):
            raise TypeError("an unbacked size meets a tensor subclass")
        real(node)

    monkeypatch.setattr(graph_edits, "propagate", fail)
    inputs = modules.qkv()
    (out, *_), recorder = record(modules.Prefill(is_causal=True), *inputs)
    (noted,) = recorder.noted("prefill")
    assert "an unbacked size meets a tensor subclass" in noted.reason and not recorder.added[0]
    torch.testing.assert_close(out, modules.Prefill(is_causal=True)(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", [{"tau": 1.0}, {"keep_ratio": 0.5}, {"keep_ratio": 0.5, "unselected": "all"}], ids=str)
def test_attention_under_autocast_computes_in_its_dtype(record, modules, rule, dtype):
    """Q and K in fp32, as rotary embeddings leave them, and V as autocast's linear gave it: the cache keeps both."""

    def forward(q, k, v):
        v = v.to(dtype)
        with torch.autocast("cpu", dtype=dtype):
            return modules.attend(q, k, v, is_causal=True), *modules.cache(k, v)

    inputs = [x.float() for x in modules.qkv()]
    (out, keys, values, kept), recorder = record(Wrapped(forward), *inputs, **rule)
    assert recorder.sites[0].prefill[0].rewritten
    assert (out.dtype, keys.dtype, values.dtype) == (dtype, torch.float32, dtype)
    rows = kept[:, 0, :, None, None].expand(-1, -1, 4, 6) if rule.get("unselected") != "all" else None
    if rule.get("tau") == 1.0:
        torch.testing.assert_close(out, forward(*inputs)[0])
    else:
        assert kept.shape[2] == 10 and bool(out.isfinite().all())
        if rows is not None:
            zero = torch.ones(2, 20, 4, 6).scatter(1, rows, 0.0).bool().transpose(1, 2)
            assert not out[zero].any() and bool((out[~zero] != 0).any())
