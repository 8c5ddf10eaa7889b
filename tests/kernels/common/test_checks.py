"""The checks that operators share: each names the argument, what was expected, what came, and what to do."""

import pytest
import torch

from zipvl_compile.kernels.common.checks import check_attention_inputs, check_mask, check_positions, fail, per_head

Q, K, V = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 3)
P = torch.zeros(2, 2, 3, dtype=torch.int64)


def test_the_one_form_of_error():
    with pytest.raises(ValueError, match=r"^zipvl::o: x: expected a list, got 3\. Pass a list\.$"):
        fail("o", "x", "a list", 3, "Pass a list.")


def test_good_inputs_pass():
    check_attention_inputs("o", Q, K, V)
    check_attention_inputs("o", Q, K, None)
    check_positions("o", P, 2, 4)
    for shape in ((2, 4, 6, 5), (1, 1, 1, 5), (2, 1, 6, 5)):
        check_mask("o", torch.ones(shape, dtype=torch.bool), Q, 6, 5)
        check_mask("o", torch.zeros(shape), Q, 6, 5)
    check_mask("o", None, Q, 6, 5)


BAD = {
    "q-rank": ((Q[0], K, V), "q: expected a [batch, heads, tokens, head_dim] tensor, got [4, 6, 8]"),
    "v-integer": ((Q, K, V.int()), "v: expected a floating-point dtype, got torch.int32"),
    "k-batch": ((Q, K[:1], V), "k: expected batch 2, like q, got 1"),
    "k-device": ((Q, K.to("meta"), V), "k: expected device cpu, like q, got meta"),
    "v-dtype": ((Q, K, V.double()), "v: expected dtype torch.float32, like q, got torch.float64"),
    "k-width": ((Q, K[..., :4], V), "k: expected head_dim 8, like q, got 4"),
    "k-heads": ((Q[:, :3], K, V), "k: expected a head count that divides q's 3, got 2"),
    "v-heads": ((Q, K, V[:, :1]), "v: expected heads and tokens [2, 5], like k, got [1, 5]"),
    "v-tokens": ((Q, K, V[:, :, :4]), "v: expected heads and tokens [2, 5], like k, got [2, 4]"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_attention_inputs(name):
    given, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::o: ") as raised:
        check_attention_inputs("o", *given)
    assert message in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (P[0], "expected an int64 [batch, groups, kept] tensor, got torch.int64 [2, 3]"),
        (P.int(), "expected an int64 [batch, groups, kept] tensor, got torch.int32 [2, 2, 3]"),
        (P[:1], "expected batch 2 and a group count that divides 4 heads, got [1, 2, 3]"),
        (P.expand(2, 2, 3).repeat(1, 2, 1)[:, :3], "got [2, 3, 3]"),
    ],
    ids=["rank", "dtype", "batch", "groups"],
)
def test_wrong_positions(positions, message):
    with pytest.raises(ValueError, match=r"^zipvl::o: positions: ") as raised:
        check_positions("o", positions, 2, 4)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 5).bool(), "expected a [batch, heads, queries, keys] tensor, got [6, 5]"),
        (torch.ones(2, 1, 6, 5).int(), "expected bool (True = visible) or an additive float, got torch.int32"),
        (torch.ones(2, 2, 6, 5).bool(), "expected a shape that broadcasts to [2, 4, 6, 5], got [2, 2, 6, 5]"),
        (torch.ones(2, 1, 6, 1).bool(), "expected a shape that broadcasts to [2, 4, 6, 5], got [2, 1, 6, 1]"),
    ],
    ids=["rank", "dtype", "heads", "keys"],
)
def test_a_wrong_mask(mask, message):
    with pytest.raises(ValueError, match=r"^zipvl::o: mask: ") as raised:
        check_mask("o", mask, Q, 6, 5)
    assert message in str(raised.value)


@pytest.mark.parametrize(("groups", "heads"), [(1, 4), (2, 4), (4, 4)])
def test_a_group_serves_neighbouring_heads(groups, heads):
    positions = torch.arange(2 * groups * 3).view(2, groups, 3)
    wide = per_head(positions, heads)
    assert wide.shape == (2, heads, 3)
    assert all(torch.equal(wide[:, h], positions[:, h * groups // heads]) for h in range(heads))
