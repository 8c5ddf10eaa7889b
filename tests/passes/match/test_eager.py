"""Attention written out, with arguments by name; what only looks like it; readers that fail."""

import pytest
import torch
from support.graph_modules import Wrapped, trace

from zipvl_compile.passes.match import eager, sdpa
from zipvl_compile.passes.match.sites import match, read_all
from zipvl_compile.passes.settings import Settings
from zipvl_compile.pipeline import rewrite

N = 20
LOWEST = torch.finfo(torch.float32).min


def hidden():
    return ~torch.ones(N, N, dtype=torch.bool).tril()


SPELLINGS = {
    "where other": lambda s: torch.softmax(torch.where(~hidden(), s, other=torch.tensor(LOWEST)), -1),
    "where of the scores": lambda s: torch.softmax(s.where(~hidden(), torch.tensor(LOWEST)), -1),
    "masked_fill by name": lambda s: torch.softmax(s.masked_fill(mask=hidden(), value=LOWEST), dim=-1),
    "softmax by name": lambda s: torch.nn.functional.softmax(input=s.masked_fill(hidden(), LOWEST), dim=-1),
    "add by name": lambda s: torch.softmax(torch.add(s, other=torch.zeros(N, N).masked_fill(hidden(), LOWEST)), -1),
}


@torch.library.custom_op("testlib::softmax", mutates_args=())
def foreign_softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.softmax(-scores, dim)


@foreign_softmax.register_fake
def _(scores, dim):
    return torch.empty_like(scores)


def attention(modules, weights, product=None):
    product = product or (lambda a, b: torch.matmul(a, other=b))

    def forward(q, k, v):
        out = product(weights(product(q, k.transpose(dim0=-1, dim1=-2)) * 8**-0.5), v)
        return out, *modules.cache(k, v)

    return Wrapped(forward)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_an_attention(record, modules, by_the_paper, spelling):
    q, k, v = modules.qkv(N, kv_heads=4)
    module = attention(modules, SPELLINGS[spelling])
    (out, *_), recorder = record(module, q, k, v, tau=1.0)
    (site,) = recorder.sites[0].prefill
    assert site.rewritten and str(site.mask) == "causal", (site.reason, str(site.mask))
    torch.testing.assert_close(out, module(q, k, v)[0], rtol=1e-12, atol=1e-12)


def test_a_softmax_of_another_library_is_none(record, modules):
    module = attention(modules, lambda s: foreign_softmax(s.masked_fill(hidden(), LOWEST), -1))
    inputs = modules.qkv(N, kv_heads=4)
    (out, *_), recorder = record(module, *inputs, tau=0.5)
    assert not recorder.sites[0].prefill
    torch.testing.assert_close(out, module(*inputs)[0])


@pytest.mark.parametrize("error", [ValueError, KeyError, AttributeError])
@pytest.mark.parametrize("broken", [eager, sdpa], ids=["eager", "sdpa"])
def test_a_reader_that_fails_is_a_refusal_with_a_reason(record, modules, monkeypatch, broken, error):
    def fail(node):
        raise error("a fault of ours")

    monkeypatch.setattr(broken, "read", fail)
    if broken is eager:
        module = attention(modules, SPELLINGS["add by name"])
    else:
        module = Wrapped(lambda q, k, v: (modules.attend(q, k, v, "plain", is_causal=True), *modules.cache(k, v)))
    inputs = modules.qkv(N, kv_heads=4)
    (out, *_), recorder = record(module, *inputs, tau=0.5)
    torch.testing.assert_close(out, module(*inputs)[0], rtol=1e-12, atol=1e-12)
    (noted,) = recorder.noted()
    assert noted.kind == "prefill" and "zipvl failed to read it" in noted.reason and "a fault of ours" in noted.reason


def test_a_site_is_matched_once(modules, monkeypatch):
    """However many passes ask: the attention of a graph is read while it is matched, and never again."""
    seen = []
    read = sdpa.read
    monkeypatch.setattr(sdpa, "read", lambda node: seen.append(node.name) or read(node))
    module = modules.Decoder("expand").double().eval()
    with torch.no_grad():
        graph = trace(module, torch.randn(2, N, 16, dtype=torch.float64))
    rewrite(graph, Settings())
    assert len(seen) == len(set(seen)) == 3


def test_sites_and_near_misses_come_in_order(modules):
    def forward(q, k, v):
        first = torch.softmax(q @ k.transpose(-1, -2), -1).relu() @ v
        second = torch.nn.functional.scaled_dot_product_attention(q, k, first)
        return torch.softmax(second @ k.transpose(-1, -2), -1) @ v

    graph = trace(forward, *(torch.randn(2, 4, N, 8) for _ in range(3)))
    attentions, misses = read_all(graph)
    assert [one.node.op for one in attentions] == ["call_function", "call_function"]
    assert [miss.pattern for miss in misses] == ["eager attention"]
    assert "'relu'" in misses[0].difference
    assert [site.kind for site in match(graph)] == ["other", "other"]
