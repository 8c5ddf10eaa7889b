"""Reading an attention call: its arguments however they are passed, heads unrepeated, the mask's form, its name."""

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import trace

from zipvl_compile.passes.match import attention_site
from zipvl_compile.passes.match.sites import read_all


def one(function, *inputs, **options):
    (site,), _ = read_all(trace(function, *inputs, **options))
    return site


def names(site):
    return [str(node.target).strip("L_") for node in (site.query, site.key, site.value)]


Q, K, V = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 10)
MASK = torch.ones(2, 1, 6, 6, dtype=torch.bool)


def test_defaults():
    site = one(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), Q, K, V)
    assert names(site) == ["q", "k", "v"]
    assert site.mask is None and not site.is_causal and site.dropout == 0 and site.inputs == (site.key, site.value)
    assert site.scale is None
    assert site.name == "(scaled_dot_product_attention)"


def test_positional_arguments():
    q, k, v = Q, K.repeat_interleave(2, 1), V.repeat_interleave(2, 1)
    site = one(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, 0.5, False), q, k, v, MASK)
    assert site.mask.op == "placeholder" and site.dropout == 0.5 and not site.is_causal


def test_keyword_arguments():
    def call(q, k, v):
        return F.scaled_dot_product_attention(
            value=v, key=k, query=q, attn_mask=None, dropout_p=0.25, is_causal=True, scale=3.0, enable_gqa=True
        )

    site = one(call, Q, K, V)
    assert names(site) == ["q", "k", "v"]
    assert site.is_causal and site.scale == 3.0 and site.dropout == 0.25


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "repeat",
    [
        lambda x: x[:, :, None, :, :].expand(2, 2, 2, x.shape[2], x.shape[3]).reshape(2, 4, x.shape[2], x.shape[3]),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, x.shape[2], x.shape[3]),
        lambda x: x.repeat_interleave(2, dim=1),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.repeat_interleave(repeats=2, dim=-3),
        lambda x: torch.repeat_interleave(x, 2, dim=1),
    ],
    ids=["expand", "expand-short", "interleave", "positional", "negative-dim", "torch-interleave"],
)
def test_repeated_heads_are_seen_through(repeat, dynamic):
    site = one(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), Q, K, V, dynamic=dynamic)
    assert names(site) == ["q", "k", "v"]
    assert site.inputs[0] is not site.key and site.inputs[1] is not site.value


@pytest.mark.parametrize(
    "repeat",
    [
        lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 4, 6, -1),
        lambda x: x[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(2, 4, 6, -1),
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x.repeat_interleave(torch.tensor([1, 3]), dim=1, output_size=4),
        lambda x: x.repeat_interleave(2, dim=2).reshape(2, 4, 6, -1),
        lambda x: x.repeat_interleave(2, dim=2),
        lambda x: torch.cat([x, x], 1),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).transpose(1, 2).reshape(2, 4, 6, -1),
        lambda x: x[:1, :, None].expand(2, -1, 2, -1, -1).reshape(2, 4, 6, -1),
    ],
    ids=["other-axis", "token-axis", "tiled", "uneven", "tokens", "longer", "cat", "transposed", "batch-too"],
)
def test_other_repetitions_are_not(repeat):
    site = one(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), enable_gqa=True), Q, K, V)
    assert site.inputs == (site.key, site.value) and site.key.op != "placeholder"


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((2, 1, 6, 6), True),
        ((1, 1, 6, 6), True),
        ((2, 4, 6, 6), True),
        ((1, 4, 6, 6), True),
        ((6, 6), True),
        ((1, 6, 6), True),
        ((4, 6, 6), True),
        ((2, 1, 1, 6), True),
        ((2, 1, 6, 1), False),
    ],
    ids=str,
)
def test_mask_fits(shape, fits):
    def call(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    assert attention_site.mask_fits(one(call, Q, K, V, torch.ones(shape, dtype=torch.bool))) is fits


def test_sizes_that_are_equal_but_not_known_to_be_fit(monkeypatch):
    """Layers count their tokens apart; what nobody has proven yet becomes a guard."""
    monkeypatch.setattr(attention_site, "statically_known_true", lambda _: False)
    test_mask_fits((2, 1, 6, 6), False)  # a head that is one is not asked for by a guard
    test_mask_fits((2, 4, 6, 6), True)


def test_attention_of_another_rank_is_no_site():
    x = torch.randn(2, 6, 8)
    sites, misses = read_all(trace(lambda x: F.scaled_dot_product_attention(x, x, x), x))
    assert not sites and [miss.difference for miss in misses] == ["inputs are not [batch, heads, tokens, head_dim]"]


def test_sites_come_in_execution_order():
    def call(q, k, v):
        first = F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)
        return F.scaled_dot_product_attention(q + first.mean(), k, v, scale=2.0, enable_gqa=True)

    assert [site.scale for site in read_all(trace(call, Q, K, V))[0]] == [1.0, 2.0]
