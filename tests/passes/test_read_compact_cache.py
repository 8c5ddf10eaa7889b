"""Decode pass: attention over the logical view becomes attention over the buffers; everything else stays an error."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import REPEATS, Wrapped
from support.recording import Noted
from torch import nn

from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes import read_compact_cache

PROMPT, KEPT = 20, torch.tensor([[[0, 3, 4, 11, 19]], [[1, 2, 7, 8, 19]]])
EVERY = torch.arange(PROMPT).repeat(2, 1, 1)
NAME = "(scaled_dot_product_attention)"
ADDED = Counter({"zipvl.decode_attention": 1})
ERASED = Counter({"zipvl.kv_view": 2, "scaled_dot_product_attention": 1})


def situation(modules, m=1, kept=KEPT, kv_heads=2, capacity=30):
    """Return inputs of a decode call after the prompt, and keys and values of all logical tokens."""
    n = PROMPT + m
    _, k, v = modules.qkv(n, kv_heads=kv_heads, seed=4)
    q = modules.qkv(m, seed=5)[0]
    p = kept.shape[2]
    keys, values = (gather_tokens(x[:, :, :PROMPT], kept, capacity - p) for x in (k, v))
    keys[:, :, p:], values[:, :, p:] = float("nan"), float("nan")
    new = k[:, :, PROMPT:].contiguous(), v[:, :, PROMPT:].contiguous()
    return (q, *new, keys, values, kept), k, v


def outcomes(recorder, graph=0):
    return [(one.kind, one.reason) for one in recorder.noted("decode", graph)]


def padding(m, n, heads=1):
    mask = torch.ones(2, heads, m, n, dtype=torch.bool).tril(n - m)
    mask[1, :, :, :5] = False
    return mask


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("form", REPEATS)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_one_site_in_every_head_form(record, modules, paper, form, m, masked):
    inputs, k, v = situation(modules, m, kv_heads=4 if form == "plain" else 2)
    n = PROMPT + m
    mask = padding(m, n) if masked else None
    out, recorder = record(modules.Decode(PROMPT, n, form, scale=0.4), *inputs, mask)
    assert recorder.noted("decode") == [Noted(NAME, "decode")]
    assert recorder.noted("prefill") == recorder.noted("others") == []
    assert recorder.added[0] == ADDED
    assert recorder.erased[0] == ERASED + REPEATS[form], "append_tokens has no users and must stay"
    exact = paper.decode(inputs[0], k, v, KEPT, PROMPT, mask=mask, scale=0.4)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    keys = inputs[3]
    assert torch.equal(keys[:, :, 5 : 5 + m], inputs[1]), "the new keys are in the caller's buffer"
    assert keys[:, :, 5 + m :].isnan().all()


@pytest.mark.parametrize("mask", ["per-head", "broadcast-batch", "additive"])
def test_masks_are_read_at_logical_positions(record, modules, paper, mask):
    inputs, k, v = situation(modules)
    given = {
        "per-head": padding(1, 21).repeat(1, 4, 1, 1),
        "broadcast-batch": padding(1, 21)[1:],
        "additive": torch.zeros(2, 1, 1, 21).double().masked_fill(~padding(1, 21), float("-inf")),
    }[mask]
    if mask == "per-head":
        given[:, 2, :, 11] = False
    out, _ = record(modules.Decode(PROMPT, 21), *inputs, given)
    np.testing.assert_allclose(
        out.numpy(), paper.decode(inputs[0], k, v, KEPT, PROMPT, mask=given), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("rewritten", [True, False], ids=["rewritten", "as-traced"])
def test_a_full_cache_gives_dense_attention(record, modules, rewritten):
    """evict="keep", or tau = 1: nothing was dropped, and even the graph that no pass touched is right."""
    inputs, k, v = situation(modules, 3, EVERY)
    mask = padding(3, 23)
    out, recorder = record(modules.Decode(PROMPT, 23), *inputs, mask, passes=rewritten)
    assert bool(recorder.added[0]) == rewritten
    dense = F.scaled_dot_product_attention(inputs[0], k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)


def test_unrewritten_view_of_a_compacted_cache_is_an_error(record, modules):
    inputs, *_ = situation(modules)
    with pytest.raises(RuntimeError, match="It holds 5 of 20 prompt tokens"):
        record(modules.Decode(PROMPT, 21), *inputs, passes=False)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_rewritten_graph_compiles_further(record, modules, paper, inner):
    inputs, k, v = situation(modules)
    out, _ = record(modules.Decode(PROMPT, 21, "expand"), *inputs, padding(1, 21), inner=inner)
    exact = paper.decode(inputs[0], k, v, KEPT, PROMPT, mask=padding(1, 21))
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(inputs[3][:, :, 5:6], inputs[1])


class Generation(nn.Module):
    """Decode with the lengths as arguments, as the cache layer carries them."""

    def __init__(self, modules):
        super().__init__()
        self.modules = modules

    def forward(self, q, k, v, keys, values, kept, prompt, n):
        step = self.modules.Decode(prompt, n)
        return step(q, k, v, keys, values, kept)


def test_later_steps_and_other_caches_do_not_recompile(record, modules, paper):
    inputs, k, v = situation(modules)
    torch._dynamo.mark_dynamic(inputs[5], 2)
    module = Generation(modules)
    _, recorder = record(module, *inputs, PROMPT, 21, dynamic=True)
    assert outcomes(recorder) == [("decode", "")]
    q, k_new, v_new, keys, values, kept = inputs
    for step in range(2, 6):
        n = PROMPT + step
        k_new, v_new = k_new + 1, v_new - 1
        k, v = torch.cat([k, k_new], 2), torch.cat([v, v_new], 2)
        out = recorder.compiled(q, k_new, v_new, keys, values, kept, PROMPT, n)
        np.testing.assert_allclose(out.numpy(), paper.decode(q, k, v, kept, PROMPT), rtol=1e-12, atol=1e-12)
    more = torch.cat([KEPT, KEPT[..., -1:]], 2)
    more[..., -2] = 15
    inputs, k, v = situation(modules, kept=more)
    out = recorder.compiled(*inputs, PROMPT, 21)
    np.testing.assert_allclose(out.numpy(), paper.decode(inputs[0], k, v, more, PROMPT), rtol=1e-12, atol=1e-12)
    assert len(recorder.graphs) <= 2, "one graph, and one more where the first step was specialised"


def test_several_attentions_of_one_cache_are_each_rewritten(record, modules, paper):
    """KV sharing between layers: reading the compacted cache twice is fine, unlike compacting it twice."""

    def shared(q, k, v, keys, values, kept):
        ops.append_tokens(keys, values, k, v, 5)
        views = ops.kv_view(keys, kept, PROMPT, 21), ops.kv_view(values, kept, PROMPT, 21)
        return modules.attend(q, *views), modules.attend(q * 2, *views, "expand")

    inputs, k, v = situation(modules)
    (first, second), recorder = record(Wrapped(shared), *inputs)
    assert outcomes(recorder) == [("decode", "")] * 2
    assert recorder.added[0] == ADDED + ADDED
    assert recorder.erased[0]["zipvl.kv_view"] == 2 and recorder.noted("others") == []
    for out, q in ((first, inputs[0]), (second, inputs[0] * 2)):
        np.testing.assert_allclose(out.numpy(), paper.decode(q, k, v, KEPT, PROMPT), rtol=1e-12, atol=1e-12)


def views(keys, values, kept, n=21):
    return ops.kv_view(keys, kept, PROMPT, n), ops.kv_view(values, kept, PROMPT, n)


def dropout(modules, q, keys, values, kept):
    return modules.attend(q, *views(keys, values, kept), dropout_p=0.25)


def causal_flag(modules, q, keys, values, kept):
    return modules.attend(q, *views(keys, values, kept), is_causal=True)


def mask_of_one_column(modules, q, keys, values, kept):
    return modules.attend(q, *views(keys, values, kept), attn_mask=torch.ones(2, 1, 1, 1, dtype=torch.bool))


def other_positions(modules, q, keys, values, kept):
    return modules.attend(q, ops.kv_view(keys, kept, PROMPT, 21), ops.kv_view(values, kept.clone(), PROMPT, 21))


REFUSED = {
    dropout: "attention dropout 0.25: the model is training",
    causal_flag: "is_causal aligns queries with the first keys, not with the last",
    mask_of_one_column: "mask of shape [2, 1, 1, 1] is not [batch, heads, queries, keys]",
    other_positions: "keys and values come from different cache layers",
}


@pytest.mark.parametrize("near_miss", REFUSED, ids=lambda function: function.__name__)
def test_near_miss_keeps_the_view_and_gives_its_reason(record, modules, near_miss):
    """Refused sites run right over a full cache, and raise over a compacted one: never a wrong answer."""
    inputs, k, v = situation(modules, kept=EVERY)
    full = gather_tokens(k, torch.arange(21).repeat(2, 1, 1), 3), gather_tokens(v, torch.arange(21).repeat(2, 1, 1), 3)
    module = Wrapped(lambda q, keys, values, kept: near_miss(modules, q, keys, values, kept))
    out, recorder = record(module, inputs[0], *full, EVERY)
    assert outcomes(recorder) == [("decode", REFUSED[near_miss])]
    assert not recorder.added[0] and not recorder.erased[0]
    assert recorder.noted("others") == [], "one attention, one line in the report"
    if near_miss is not dropout:
        options = {"is_causal": True} if near_miss is causal_flag else {}
        dense = modules.attend(inputs[0], k, v, **options)
        torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)
    compacted = situation(modules)[0]
    with pytest.raises(RuntimeError, match="keeps only the important prompt tokens"):
        record(module, inputs[0], *compacted[3:])


def only_keys_are_a_view(modules, q, keys, values, kept):
    return modules.attend(q, ops.kv_view(keys, kept, PROMPT, 21), values[:, :, :21])


def only_values_are_a_view(modules, q, keys, values, kept):
    return modules.attend(q, keys[:, :, :21], ops.kv_view(values, kept, PROMPT, 21))


def scaled_view(modules, q, keys, values, kept):
    k, v = views(keys, values, kept)
    return modules.attend(q, k * 1.5, v)


def heads_in_another_order(modules, q, keys, values, kept):
    k, v = (x[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 4, 21, -1) for x in views(keys, values, kept))
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("computed", [scaled_view, heads_in_another_order], ids=lambda function: function.__name__)
def test_what_is_computed_from_views_token_by_token_reads_the_cache_in_memory(record, modules, computed):
    inputs, k, v = situation(modules, kept=EVERY)
    full = gather_tokens(k, torch.arange(21).repeat(2, 1, 1), 3), gather_tokens(v, torch.arange(21).repeat(2, 1, 1), 3)
    module = Wrapped(lambda q, keys, values, kept: computed(modules, q, keys, values, kept))
    expected = module(inputs[0], *full, EVERY)
    out, recorder = record(module, inputs[0], *full, EVERY)
    assert outcomes(recorder) == [("decode", "")]
    assert not any("kv_view" in node.name for node in recorder.graphs[0].nodes)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "near_miss",
    [only_keys_are_a_view, only_values_are_a_view],
    ids=lambda function: function.__name__,
)
def test_other_near_misses_are_no_decode_sites(record, modules, near_miss):
    inputs, k, v = situation(modules, kept=EVERY)
    full = gather_tokens(k, torch.arange(21).repeat(2, 1, 1), 3), gather_tokens(v, torch.arange(21).repeat(2, 1, 1), 3)
    module = Wrapped(lambda q, keys, values, kept: near_miss(modules, q, keys, values, kept))
    expected = module(inputs[0], *full, EVERY)
    out, recorder = record(module, inputs[0], *full, EVERY)
    assert outcomes(recorder) == [] and not recorder.added[0] and not recorder.erased[0]
    assert recorder.noted("others"), "but the report names it"
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_view_that_something_else_reads_survives(record, modules):
    def also_summed(q, keys, values, kept):
        k, v = views(keys, values, kept)
        return modules.attend(q, k, v), k.sum()

    inputs, k, v = situation(modules, kept=EVERY)
    full = gather_tokens(k, torch.arange(21).repeat(2, 1, 1)), gather_tokens(v, torch.arange(21).repeat(2, 1, 1))
    (_, total), recorder = record(Wrapped(also_summed), inputs[0], *full, EVERY)
    assert recorder.erased[0] == Counter({"zipvl.kv_view": 1, "scaled_dot_product_attention": 1})
    torch.testing.assert_close(total, k.sum())


@pytest.mark.parametrize("broken", ["refusal", "four_axes"])
def test_a_fault_of_ours_is_a_reason_and_the_view_stays(record, modules, monkeypatch, broken):
    def fail(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(read_compact_cache, broken, fail)
    q, k, v = modules.qkv()
    kept = torch.arange(20).repeat(2, 1, 1)

    def decode(q, k, v, mask):
        keys, values = ops.kv_view(k, kept, 20, 20), ops.kv_view(v, kept, 20, 20)
        return modules.attend(q, keys, values, attn_mask=mask)

    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    out, recorder = record(Wrapped(decode), q[:, :, :1], k, v, mask)
    (noted,) = recorder.noted("decode")
    assert "zipvl failed on it (KeyError: 'a fault of ours')" in noted.reason
    torch.testing.assert_close(out, modules.attend(q[:, :, :1], k, v, attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding_under_autocast_computes_in_its_dtype(record, modules, dtype):
    q, k, v = (x.float() for x in modules.qkv())
    kept = torch.arange(20).repeat(2, 1, 1)

    def decode(q, k, v):
        with torch.autocast("cpu", dtype=dtype):
            keys, values = ops.kv_view(k, kept, 20, 20), ops.kv_view(v.to(dtype), kept, 20, 20)
            return modules.attend(q, keys, values)

    out, recorder = record(Wrapped(decode), q[:, :, :1], k, v)
    assert recorder.sites[0].decode[0].rewritten and out.dtype == dtype
    torch.testing.assert_close(out, decode(q[:, :, :1], k, v))
