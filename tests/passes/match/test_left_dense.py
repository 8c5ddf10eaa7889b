"""The report of what stays dense: every attention once, with a reason that is true and a remedy that helps."""

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import Wrapped
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.match import left_dense
from zipvl_compile.passes.match.sites import match

EAGER = (
    "not recognised as attention (nearest pattern: eager attention; first difference: the attention weights go through "
    "'relu' before the values): call model.set_attn_implementation('sdpa')"
)
FLEX = (
    "nearest pattern: FlexAttention; first difference: its mask and scores are functions (mask_mod, score_mod), not "
    "tensors"
)
CROSS = "no KV cache: cross-attention, or an encoder that attends in chunks"
VISION = "no KV cache: a vision tower or an encoder"
NO_CACHE = "no KV cache: the call has use_cache=False, or needs gradients"
FULL, STATIC = str(left_dense.FULL_CACHE), str(left_dense.STATIC_CACHE)


def reported(recorder):
    """Return kind and reason of everything that stayed dense, whichever pass said so."""
    return sorted((site.kind, site.reason) for site in recorder.noted() if not site.rewritten)


def matmul_attention(q, k, v):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return torch.softmax(q @ k.transpose(-1, -2), -1).relu() @ v


def vision(modules, q, k, v):
    return F.scaled_dot_product_attention(q, q, q)


def vision_with_mask(modules, q, k, v):
    return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(20, 20, dtype=torch.bool))


def no_cache(modules, q, k, v):
    return modules.attend(q, k + 1, v + 1, is_causal=True)


def no_cache_and_keys_turned_in_place(modules, q, k, v):
    k = k + 1
    k[:, :, :, :4] = -k[:, :, :, :4]
    return modules.attend(q, k, v + 1, is_causal=True)


def no_cache_and_a_mask_of_data(modules, q, k, v):
    rows = v[:, :1, :, :1]
    return modules.attend(q, k + 1, v + 1, attn_mask=rows <= rows.transpose(2, 3) + 3)


def keys_from_outside(modules, q, k, v):
    return modules.attend(q, k, v, is_causal=True)


def cross(modules, q, k, v):
    return modules.attend(q[:, :, :5], k, v)


def full_cache(modules, q, k, v):
    k, v = torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)
    return modules.attend(q[:, :, :1], k, v), k, v


def full_cache_repeated(modules, q, k, v):
    k, v = torch.cat([k, k[:, :, :1]], dim=2), torch.cat([v, v[:, :, :1]], dim=2)
    return modules.attend(q[:, :, :1], k, v, "expand"), k, v


def cache_that_is_only_looked_at(modules, q, k, v):
    """As a block of DiffusionGemma, which reads the window that another cache holds."""
    return full_cache(modules, q, k, v)[0]


def foreign_cache(modules, q, k, v):
    """As a quantized cache: what was unpacked, the residual, and the new token."""
    k, v = (torch.cat([x * 2, x[:, :, :3], x[:, :, :1]], dim=2) for x in (k, v))
    return modules.attend(q[:, :, :1], k, v, "expand")


def static_prefill(modules, q, k, v):
    where = torch.arange(20)
    keys = k.new_zeros(2, 2, 30, 8).index_copy_(2, where, k)
    values = v.new_zeros(2, 2, 30, 6)
    values[:, :, where] = v
    return modules.attend(q, keys[:, :, :20], values[:, :, :20], is_causal=True)


def static_decode(modules, q, k, v):
    k.index_copy_(2, torch.tensor([19]), k[:, :, 19:])
    return modules.attend(q[:, :, 19:], k, v, attn_mask=(torch.arange(20) < 18)[None])


def static_decode_by_an_index(modules, q, k, v):
    k[:, :, torch.tensor([19])] = k[:, :, 19:] + 0
    return modules.attend(q[:, :, 19:], k, v)


def static_window(modules, q, k, v):
    k.copy_(k.roll(0, 2))
    return modules.attend(q[:, :, 19:], k, v)


def window_of_a_static_cache(modules, q, k, v):
    k, stored = k + 1, k.new_empty(2, 2, 5, 8)
    stored.copy_(k[:, :, -5:])
    return modules.attend(q, k, v + 1, is_causal=True), stored


def keys_of_one_layer_and_values_of_none(modules, q, k, v):
    kept = torch.arange(20).repeat(2, 1, 1)
    return modules.attend(q[:, :, :1], ops.kv_view(k, kept, 20, 20), v)


def eager_prefill(modules, q, k, v):
    return matmul_attention(q, k, v), modules.cache(k, v)


@torch.library.custom_op("zipvl_tests::flash", mutates_args=())
def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@flash.register_fake
def _(q, k, v):
    return q.new_empty(*q.shape[:3], v.shape[3])


def flash_prefill(modules, q, k, v):
    stored = modules.cache(k, v)
    return flash(q, k.transpose(1, 2).transpose(1, 2), v), stored


def cached_and_not_read(modules, q, k, v):
    return modules.attend(q, q, q), modules.cache(k, v), k + 1


def eager_decode(modules, q, k, v):
    kept = torch.arange(20).repeat(2, 1, 1)
    return matmul_attention(q[:, :, :1], ops.kv_view(k, kept, 20, 20), ops.kv_view(v, kept, 20, 20))


REASONS = {
    vision: [("other", VISION)],
    vision_with_mask: [("other", VISION)],
    no_cache: [("other", NO_CACHE)],
    no_cache_and_keys_turned_in_place: [("other", NO_CACHE)],
    no_cache_and_a_mask_of_data: [("other", "no KV cache: a vision tower, an encoder, or a call with use_cache=False")],
    keys_from_outside: [("prefill", str(left_dense.OTHER_GRAPH))],
    cross: [("other", CROSS)],
    full_cache: [("decode", FULL)],
    full_cache_repeated: [("decode", FULL)],
    cache_that_is_only_looked_at: [("decode", str(left_dense.FOREIGN_CACHE))],
    foreign_cache: [("decode", str(left_dense.FOREIGN_CACHE))],
    static_prefill: [("prefill", STATIC)],
    static_decode: [("decode", STATIC)],
    static_decode_by_an_index: [("decode", STATIC)],
    static_window: [("decode", STATIC)],
    window_of_a_static_cache: [("prefill", str(left_dense.WINDOW))],
    keys_of_one_layer_and_values_of_none: [("decode", "keys and values are not cached by the same layer")],
    eager_prefill: [("prefill", EAGER)],
    flash_prefill: [("prefill", "the cached keys are read by zipvl_tests::flash: " + left_dense.SDPA_HELPS)],
    cached_and_not_read: [
        ("other", VISION),
        ("prefill", "no attention over the cached keys: " + left_dense.SDPA_HELPS),
    ],
}


@pytest.mark.parametrize("case", REASONS, ids=lambda function: function.__name__)
def test_reason(record, modules, case):
    inputs = modules.qkv()
    module = Wrapped(lambda q, k, v: case(modules, q, k, v))
    expected = module(*inputs)
    out, recorder = record(module, *inputs)
    assert reported(recorder) == REASONS[case]
    assert not recorder.added[0] and not recorder.erased[0]
    if isinstance(out, tuple):  # the cache's spare rows are unwritten memory
        out, expected = out[0], expected[0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_matmul_attention_over_a_compacted_cache_is_named(record, modules):
    _, recorder = record(Wrapped(lambda q, k, v: eager_decode(modules, q, k, v)), *modules.qkv())
    assert reported(recorder) == [("decode", EAGER)], "once a layer, though it has a view of keys and one of values"


@pytest.mark.parametrize("evict", ["drop", "keep"])
def test_rewritten_sites_are_not_reported_again(record, modules, evict):
    torch.manual_seed(0)
    _, recorder = record(modules.Decoder("expand").double(), torch.randn(2, 20, 16, dtype=torch.float64), evict=evict)
    assert reported(recorder) == []


@pytest.mark.parametrize("evict", ["drop", "keep"])
def test_eager_layer_beside_a_rewritten_one_is_named(record, modules, evict):
    def both(q, k, v):
        first = modules.cache(k, v)
        out = modules.attend(q, k, v, is_causal=True)
        k2, v2 = k + 1, v + 1
        return out, first, matmul_attention(q, k2, v2), modules.cache(k2, v2)

    _, recorder = record(Wrapped(both), *modules.qkv(), evict=evict)
    assert reported(recorder) == [("prefill", EAGER)]


@pytest.mark.parametrize("evict", ["drop", "keep"])
def test_refused_prefill_is_reported_once_and_with_the_refusal(record, modules, evict):
    _, recorder = record(modules.Prefill("expand", dropout_p=0.25, is_causal=True), *modules.qkv(), evict=evict)
    assert reported(recorder) == [("prefill", "attention dropout 0.25: the model is training")]


def test_refused_decode_is_reported_once_and_with_the_refusal(record, modules):
    def refused(q, keys, values, kept):
        where = (kept, 20, 20)
        return modules.attend(q, ops.kv_view(keys, *where), ops.kv_view(values, *where), "expand", is_causal=True)

    q, k, v = modules.qkv()
    _, recorder = record(Wrapped(refused), q[:, :, :1], k, v, torch.arange(20).repeat(2, 1, 1))
    assert reported(recorder) == [("decode", "is_causal aligns queries with the first keys, not with the last")]


class TwoAttentions(nn.Module):
    """Self- and cross-attention in one module: both sites have its name."""

    def __init__(self, modules, dropout):
        super().__init__()
        self.modules, self.dropout = modules, dropout

    def forward(self, q, k, v):
        out = self.modules.attend(q, k, v, is_causal=True, dropout_p=self.dropout)
        return out, self.modules.attend(q[:, :, :5], k + 1, v + 1), self.modules.cache(k, v)


@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["rewritten", "refused"])
def test_sites_of_one_module_do_not_hide_each_other(record, modules, dropout):
    module = modules.Packed(TwoAttentions(modules, dropout), *modules.qkv())
    _, recorder = record(module, modules.pack(*modules.qkv()))
    expected = [("other", CROSS)]
    if dropout:
        expected.append(("prefill", "attention dropout 0.25: the model is training"))
    assert reported(recorder) == expected


def test_names_are_module_paths(record, modules):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.ModuleList([Wrapped(lambda x: F.scaled_dot_product_attention(x, x, x)) for _ in range(2)])

        def forward(self, x):
            for block in self.tower:
                x = block(x)
            return x

    _, recorder = record(Model(), modules.qkv()[0])
    sites = [(site.layer, site.kind, site.reason) for site in recorder.noted("others")]
    assert sites == [(f"tower.{i}", "other", VISION) for i in range(2)]


def test_values_that_are_not_the_cached_ones_do_not_read_as_a_missing_cache(record, modules):
    def mixed(q, k, v):
        return modules.attend(q, k, v.flip(2), is_causal=True), modules.cache(k, v)

    _, recorder = record(Wrapped(mixed), *modules.qkv())
    (kind, reason), *others = reported(recorder)
    assert not others and kind == "prefill", "a decoder that stays dense must warn"
    assert "same layer" in reason and "no KV cache" not in reason


def test_graph_break_between_cache_and_attention_is_not_blamed_on_the_attention_implementation(record, modules):
    def broken(q, k, v):
        stored = modules.cache(k, v)
        torch._dynamo.graph_break()
        return modules.attend(q, k, v, is_causal=True), stored

    _, recorder = record(Wrapped(broken), *modules.qkv())
    assert all("_implementation" not in reason for _, reason in reported(recorder))


def test_every_attention_of_a_mixed_graph_is_reported_exactly_once(record, modules):
    def mixed(q, k, v):
        a = vision(modules, q, k, v)
        b = modules.attend(q, k, v, is_causal=True)
        first = modules.cache(k, v)
        k2, v2 = k * 2, v * 2
        c = modules.attend(q, k2, v2, dropout_p=0.25)
        second = modules.cache(k2, v2)
        return a, b, c, first, second, cross(modules, q, k + 1, v + 1)

    _, recorder = record(Wrapped(mixed), *modules.qkv())
    sites = recorder.noted()
    assert sorted(site.kind for site in sites) == ["other", "other", "prefill", "prefill"]
    assert [site.rewritten for site in sites if site.kind == "prefill"] == [True, False]


def test_attention_without_a_head_axis_is_reported(record):
    _, recorder = record(Wrapped(lambda x: F.scaled_dot_product_attention(x, x, x)), torch.randn(2, 6, 8))
    assert reported(recorder) == [
        (
            "other",
            "nearest pattern: scaled_dot_product_attention; "
            "first difference: inputs are not [batch, heads, tokens, head_dim]",
        )
    ]


def flex_decode(q, k, v):
    k, v = torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)
    return flex_attention(q[:, :, :1], k, v, enable_gqa=True), k, v


def flex_over_keys_that_are_only_looked_at(q, k, v):
    return flex_decode(q, k, v)[0]


def flex_without_a_cache(q, k, v):
    return flex_attention(q, k + 1, v + 1, enable_gqa=True)


@pytest.mark.parametrize(
    ("case", "expected"),
    [(flex_decode, ("decode", FULL)), (flex_over_keys_that_are_only_looked_at, ("other", FLEX)),
     (flex_without_a_cache, ("other", FLEX))],
)  # fmt: skip
def test_flex_attention_over_a_cache_that_grows_is_decoding(modules, case, expected):
    """The graph is read and not run: what FlexAttention returns besides its output is not what it is traced to be."""
    found = []

    def read(gm, inputs):
        found.extend((one.kind, str(one.reason)) for one in match(gm.graph).outcomes)
        outputs = gm.graph.output_node().args[0]
        return lambda *given: given[:1] * len(outputs)

    torch._dynamo.reset()
    torch.compile(case, backend=read)(*modules.qkv())
    assert found == [expected]
