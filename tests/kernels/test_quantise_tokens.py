"""quantise_tokens: which tokens share a scale, chunk by chunk, whatever their number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.kernels import quantise_tokens as module
from zipvl_compile.kernels.common import codes as common
from zipvl_compile.kernels.common.codes import BITS, GROUP, dequantised, groups_of, quantised
from zipvl_compile.kernels.quantise_tokens import quantise_tokens

SOME = torch.randn(2, 4, 150, 16, generator=torch.Generator().manual_seed(0))


def chosen(x, positions):
    """Return the rows of x at the positions, head by head."""
    heads, groups = x.shape[1], positions.shape[1]
    return torch.stack([
        torch.stack([x[b, h, positions[b, h * groups // heads]] for h in range(heads)]) for b in range(x.shape[0])
    ])  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(count=st.sampled_from([0, 1, 2, 63, 64, 65, 128, 130, 150]), groups=st.sampled_from([1, 2, 4]),
       bits=st.sampled_from(BITS), per=st.sampled_from(["channel", "token"]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
       most=st.sampled_from([1, 1 << 22]), seed=st.integers(0, 99))  # fmt: skip
def test_each_group_is_quantised_by_itself(count, groups, bits, per, dtype, most, seed):
    """`most` = 1 takes one group at a time."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(150, generator=generator)[:count].sort().values for _ in range(2 * groups)])
    positions, x = positions.view(2, groups, count), SOME.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "MOST", most)
        codes, scales = quantise_tokens(x, positions, bits, per)
    padded = groups_of(count) * GROUP
    assert codes.shape == (2, 4, padded, 2 * bits) and codes.dtype == torch.uint8
    assert scales.shape == (2, 4, *((padded // GROUP, 16) if per == "channel" else (padded, 1)), 2)
    assert scales.dtype == dtype
    rows = chosen(x, positions)
    for start in range(0, count, GROUP):
        real = rows[:, :, start : start + GROUP]
        size = real.shape[2]
        own, shared = quantised(real[:, :, None], bits, 3 if per == "channel" else 4)
        assert torch.equal(codes[:, :, start : start + size], own.flatten(2, 3))
        if per == "channel":
            assert torch.equal(scales[:, :, start // GROUP], shared[:, :, 0, 0]), "what fills a group up does not count"
        else:
            assert torch.equal(scales[:, :, start : start + size], shared.flatten(2, 3))
    assert dequantised(codes, scales, 16).isfinite().all(), "what fills a group up is finite, too"


@pytest.mark.parametrize("count", [0, 30])
def test_an_empty_batch(count):
    codes, scales = quantise_tokens(SOME[:0], torch.zeros(0, 1, count, dtype=torch.int64), 4, "channel")
    assert codes.shape == (0, 4, groups_of(count) * GROUP, 8) and scales.shape == (0, 4, groups_of(count), 16, 2)


@pytest.mark.parametrize("per", ["channel", "token"])
def test_the_order_in_memory_does_not_matter(per):
    positions = torch.arange(1, 150, 2).expand(2, 1, -1)
    others = SOME.transpose(1, 2).contiguous().transpose(1, 2), SOME.transpose(2, 3).contiguous().transpose(2, 3)
    expected = quantise_tokens(SOME, positions, 2, per)
    for x in others:
        assert all(map(torch.equal, quantise_tokens(x, positions, 2, per), expected))


def test_a_few_groups_are_widened_at_a_time(monkeypatch):
    """What is alive at once is bounded, however long the prompt."""
    sizes = []
    monkeypatch.setattr(common, "MOST", 2 * 4 * 16 * GROUP)
    monkeypatch.setattr(module, "quantised", lambda x, *given: sizes.append(x.numel()) or quantised(x, *given))
    quantise_tokens(SOME, torch.arange(150).expand(2, 1, -1), 4, "token")
    assert sizes == [2 * 4 * 16 * GROUP] * 3


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("per", ["channel", "token"])
def test_a_number_of_tokens_that_only_the_data_knows(unbacked, per, inner):
    step = unbacked(
        lambda x, shown: torch.ops.zipvl.quantise_tokens(x, shown.nonzero().view(1, 1, -1).expand(2, 1, -1), 4, per),
        inner,
    )
    for every in (2, 3, 1000):
        shown = torch.arange(150) % every == 1
        expected = quantise_tokens(SOME, shown.nonzero().view(1, 1, -1).expand(2, 1, -1), 4, per)
        assert all(map(torch.equal, step(SOME, shown), expected))


GOOD = {"x": SOME, "positions": torch.arange(3).expand(2, 1, -1), "bits": 4, "per": "channel"}
BAD = {
    "x-rank": ({"x": SOME[0]}, "x: expected a floating-point [batch, heads, tokens, head_dim] tensor"),
    "x-dtype": ({"x": SOME.int()}, "x: expected a floating-point [batch, heads, tokens, head_dim] tensor, got"),
    "positions-batch": ({"positions": GOOD["positions"][:1]}, "positions: expected batch 2"),
    "positions-groups": ({"positions": GOOD["positions"].repeat(1, 3, 1)}, "a group count that divides 4 heads"),
    "bits": ({"bits": 3}, "bits: expected 8, 4 or 2, got 3."),
    "per": ({"per": "head"}, "per: expected \"channel\" or \"token\", got 'head'."),
    "odd-width": ({"x": SOME[..., :15]}, "x: expected a head_dim that 2 divides, to fill bytes of 4 bits, got 15."),
    "even-width": ({"x": SOME[..., :14], "bits": 2}, "x: expected a head_dim that 4 divides"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::quantise_tokens: ") as raised:
        quantise_tokens(**(GOOD | given_))
    assert message in str(raised.value) and str(raised.value).endswith(".")


def test_a_byte_of_eight_bits_needs_no_even_width():
    codes, _ = quantise_tokens(SOME[..., :15], GOOD["positions"], 8, "token")
    assert codes.shape == (2, 4, GROUP, 15)
