"""Latent attention (MLA): the cache holds latents, keys and values are computed from them token by token."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import SPARE, Packed, Wrapped, pack
from support.recording import outcomes

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import TokenRows

HEADS, RANK, ROPE, VALUE = 4, 6, 2, 5
GENERATOR = torch.Generator().manual_seed(5)
UP = torch.randn(HEADS * (RANK + VALUE), RANK, generator=GENERATOR, dtype=torch.float64)


def latents(n, seed=0, batch=2):
    """Return queries `[B, H, n, RANK + ROPE]`, latents `[B, 1, n, RANK]` and rotary keys `[B, 1, n, ROPE]`."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, HEADS, n, RANK + ROPE, generator=generator, dtype=torch.float64)
    c = torch.randn(batch, 1, n, RANK + ROPE, generator=generator, dtype=torch.float64)
    return q, c[..., :RANK].contiguous(), c[..., RANK:].contiguous()


def expand(latent, rope):
    """Expand as DeepSeek V3 does in transformers: a view, a split, and copies into an empty tensor."""
    batch, _, n, _ = latent.shape
    wide = F.linear(latent, UP).view(batch, n, -1, RANK + VALUE).transpose(1, 2)
    k_nope, v = torch.split(wide, [RANK, VALUE], dim=-1)
    rope = rope.expand(-1, HEADS, -1, -1)
    k = wide.new_empty(*wide.shape[:-1], RANK + ROPE)
    k[..., :RANK].copy_(k_nope)
    k[..., RANK:].copy_(rope)
    return k, v


def expand_by_cat(latent, rope):
    batch, _, n, _ = latent.shape
    wide = F.linear(latent, UP).reshape(batch, n, HEADS, -1).transpose(2, 1).contiguous()
    k_nope, v = wide.split([RANK, VALUE], -1)
    return torch.cat([k_nope, rope.expand(batch, HEADS, n, ROPE)], dim=-1), v * 1.0


def cache(latent, rope):
    kept = ops.token_positions(latent)
    return ops.gather_tokens(latent, kept, SPARE), ops.gather_tokens(rope, kept, SPARE), kept


def prefill(expansion):
    def forward(q, latent, rope):
        stored = cache(latent, rope)
        return F.scaled_dot_product_attention(q, *expansion(latent, rope), is_causal=True), *stored

    return forward


EXPANSIONS = pytest.mark.parametrize("expansion", [expand, expand_by_cat], ids=lambda f: f.__name__)


@EXPANSIONS
def test_latents_serve_all_heads(record, by_the_paper, expansion):
    """Every head's keys come from one cached latent, so that no head can keep tokens of its own; the site says so."""
    q, latent, rope = latents(20)
    (out, _, _, kept), recorder = record(Wrapped(prefill(expansion)), q, latent, rope, groups="kv_head")
    (site,) = recorder.sites[0].outcomes
    assert site.rewritten and "one selection for all heads" in str(site.note)
    exact, positions = by_the_paper(q, *expand(latent, rope))
    assert np.array_equal(kept.numpy(), positions)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("evict", ["drop", "keep"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@EXPANSIONS
def test_prefill_attends_and_caches_the_kept_tokens(record, by_the_paper, expansion, dynamic, evict):
    q, latent, rope = latents(20)
    module = Packed(Wrapped(prefill(expansion)), q, latent, rope)
    (out, kept_latents, kept_rope, kept), recorder = record(module, pack(q, latent, rope), dynamic=dynamic, evict=evict)
    assert outcomes(recorder) == [("prefill", "")]
    exact, positions = by_the_paper(q, *expand(latent, rope))
    assert positions.shape[2] < 20
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    if evict == "drop":
        p = positions.shape[2]
        assert np.array_equal(kept.numpy(), positions) and kept_latents.shape == (2, 1, p + SPARE, RANK)
        for compact, full in ((kept_latents, latent), (kept_rope, rope)):
            assert torch.equal(compact[:, :, :p], full.gather(2, kept[..., None].expand(-1, -1, -1, full.shape[3])))
    else:
        assert kept.shape[2] == 20 and torch.equal(kept_latents[:, :, :20], latent)


def decode(expansion, prompt, n):
    def forward(q, latents, ropes, kept, mask=None):
        views = (ops.kv_view(x, kept, prompt, n) for x in (latents, ropes))
        return F.scaled_dot_product_attention(q, *expansion(*views), attn_mask=mask)

    return forward


def compacted(*tensors):
    """Return the kept positions of a prompt of 20 tokens, and the buffers: kept tokens, later tokens, spare rows."""
    kept = torch.tensor([[[0, 3, 4, 9, 19]], [[1, 2, 7, 11, 19]]])
    return kept, [torch.cat([ops.gather_tokens(x[:, :, :20], kept, 0), x[:, :, 20:], x[:, :, :3]], 2) for x in tensors]


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padding"])
@EXPANSIONS
def test_decode_expands_the_latents_in_memory_only(record, paper, expansion, masked):
    q, latent, rope = latents(24)
    kept = torch.tensor([[[0, 3, 4, 9, 19]], [[1, 2, 7, 11, 19]]])
    buffers = [
        torch.cat([ops.gather_tokens(x[:, :, :20], kept, 0), x[:, :, 20:], x[:, :, :3]], 2) for x in (latent, rope)
    ]
    mask = torch.ones(2, 1, 2, 24, dtype=torch.bool)
    mask[0, ..., :2] = False
    mask = mask if masked else None
    out, recorder = record(Wrapped(decode(expansion, 20, 24)), q[:, :, -2:], *buffers, kept, mask)
    assert outcomes(recorder) == [("decode", "")]
    exact = paper.decode(q[:, :, -2:], *expand(latent, rope), kept.numpy(), 20, mask=mask)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)
    widths = [node.meta["example_value"].shape[2] for node in recorder.graphs[0].nodes if "linear" in node.name]
    assert not any("kv_view" in node.name for node in recorder.graphs[0].nodes) and widths == [5 + 4]


@EXPANSIONS
def test_decode_with_symbolic_lengths(record, paper, expansion):
    """The kept tokens, the prompt and the sequence are symbols, as after a few generations."""
    q, latent, rope = latents(24)
    kept = torch.tensor([[[0, 3, 4, 9, 19]], [[1, 2, 7, 11, 19]]])
    buffers = [
        torch.cat([ops.gather_tokens(x[:, :, :20], kept, 0), x[:, :, 20:], x[:, :, :3]], 2) for x in (latent, rope)
    ]

    def forward(q, latents, ropes, kept, logical):
        return decode(expansion, 20, logical.shape[0])(q, latents, ropes, kept)

    out, recorder = record(Wrapped(forward), q[:, :, -1:], *buffers, kept, torch.zeros(24), dynamic=True)
    assert outcomes(recorder) == [("decode", "")]
    exact = paper.decode(q[:, :, -1:], *expand(latent, rope), kept.numpy(), 20)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-12, atol=1e-12)


def cumulative(latent, rope):
    return expand(latent.cumsum(2), rope)


def reversed_tokens(latent, rope):
    return expand(latent.flip(2), rope)


def shifted(latent, rope):
    return expand(torch.cat([latent[:, :, 1:], latent[:, :, :1]], 2), rope)


def mixed_by_a_product(latent, rope):
    k, v = expand(latent, rope)
    return torch.ones(20, 20, dtype=k.dtype).tril() @ k, v


def along_the_tokens(latent, rope):
    n = latent.shape[2]
    return expand(F.linear(latent.transpose(2, 3), torch.eye(n, dtype=latent.dtype).roll(1)).transpose(2, 3), rope)


def regrouped(latent, rope):
    k, v = expand(latent, rope)
    return k.reshape(k.shape[0], k.shape[2], k.shape[1], k.shape[3]).transpose(1, 2), v


def position_added(latent, rope):
    return expand(latent + torch.arange(latent.shape[2], dtype=latent.dtype)[:, None], rope)


def written_over(latent, rope):
    k, v = expand(latent, rope)
    k[:, :, 0].zero_()
    return k, v


MIXING = {
    cumulative: "'cumsum' may mix tokens",
    reversed_tokens: "'flip' may mix tokens",
    shifted: "'cat' joins tokens with others",
    mixed_by_a_product: "'matmul' may mix tokens",
    along_the_tokens: "'linear' works along the tokens",
    regrouped: "'reshape' takes the token axis apart",
    position_added: "'add' meets a tensor with tokens of its own",
    written_over: "changed in place",
}


@pytest.mark.parametrize("mixing", MIXING, ids=lambda f: f.__name__)
def test_keys_that_mix_tokens_stay_dense_and_say_where(record, mixing):
    q, latent, rope = latents(20)
    out, recorder = record(Wrapped(prefill(mixing)), q, latent, rope)
    assert not recorder.added[0] and not recorder.erased[0]
    ((kind, reason),) = outcomes(recorder)
    assert kind == "prefill" and "latent KV cache" in reason and MIXING[mixing] in reason
    torch.testing.assert_close(out[0], prefill(mixing)(q, latent, rope)[0])


@pytest.mark.parametrize("mixing", MIXING, ids=lambda f: f.__name__)
def test_decode_that_mixes_tokens_is_right_over_a_full_cache_and_refused_over_a_compacted_one(record, mixing):
    q, latent, rope = latents(20)
    every = torch.arange(20).repeat(2, 1, 1)
    module = Wrapped(decode(mixing, 20, 20))
    out, recorder = record(module, q[:, :, -1:], latent, rope, every)
    assert not recorder.added[0]
    ((kind, reason),) = outcomes(recorder)
    assert kind == "decode" and MIXING[mixing] in reason
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q[:, :, -1:], *mixing(latent, rope)))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="keeps only the important prompt tokens"):
        record(module, q[:, :, -1:], latent[:, :, :15], rope[:, :, :15], every[:, :, :15])


def test_only_what_is_computed_from_the_sources_has_their_rows():
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    negated, other = graph.call_method("neg", (a,)), graph.call_method("neg", (b,))
    mixed = graph.call_method("cumsum", (a, 2))
    for node in (a, b, negated, other, mixed):
        node.meta["example_value"] = torch.zeros(1, 1, 3, 4)
    graph.output((negated, other, mixed))
    rows = TokenRows([a])
    assert list(rows.cone([negated]).nodes) == [negated]
    with pytest.raises(Mixes, match="tokens of its own"):
        rows.cone([other])
    with pytest.raises(Mixes, match="cumsum"):
        rows.cone([mixed])
