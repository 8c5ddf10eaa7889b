"""Numbers of few bits: packing, its inverse, and how far quantised numbers are from what they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantised import by_hand

from zipvl_compile.kernels.common.codes import BITS, GROUP, bits_of, dequantised, groups_of, packed, planes, quantised

in_every_width = pytest.mark.parametrize("bits", BITS)
in_every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)


def test_bytes_hold_channels_plane_by_plane():
    codes = torch.tensor([[1, 2, 3, 0, 2, 1, 0, 3]], dtype=torch.uint8)
    assert packed(codes, 2).tolist() == [[1 + 3 * 4 + 2 * 16 + 0 * 64, 2 + 0 * 4 + 1 * 16 + 3 * 64]]
    assert packed(codes, 4).tolist() == [[1 + 2 * 16, 2 + 1 * 16, 3 + 0 * 16, 0 + 3 * 16]]
    assert torch.equal(packed(codes, 8), codes)


@in_every_width
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(width=st.integers(1, 12), tokens=st.integers(0, 5), seed=st.integers(0, 99))
def test_what_was_packed_is_read_again(bits, width, tokens, seed):
    width *= 8 // bits
    codes = torch.randint(2**bits, (2, tokens, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    bytes_ = packed(codes, bits)
    assert bytes_.shape == (2, tokens, width * bits // 8) and bytes_.dtype == torch.uint8
    assert bits_of(bytes_, width) == bits
    assert torch.equal(torch.cat(planes(bytes_, width), -1), codes.int())


def error_in_steps(x, bits, axis):
    """Return how far from `x [1, 1, R, D]`, whose scales are along `axis`, its codes are: in steps, less rounding."""
    codes, scales = quantised(x.unflatten(2, (-1, GROUP)), bits, axis)
    got = dequantised(codes.flatten(2, 3), scales.flatten(2, 3), x.shape[3])
    assert got.dtype == scales.dtype == x.dtype
    step = scales.flatten(2, 3)[..., 0].double()
    step = step.repeat_interleave(x.shape[2] // step.shape[2], 2)
    rounding = torch.finfo(x.dtype).eps * x.double().abs().amax()
    exact = by_hand(codes.flatten(2, 3), scales.flatten(2, 3), x.shape[3])
    assert (got.double() - exact).abs().max() <= rounding, "codes mean what they say"
    return ((exact - x.double()).abs() - 4 * torch.finfo(torch.float32).eps * x.double().abs().amax()) / step


@in_every_width
@in_every_dtype
@pytest.mark.parametrize("axis", [3, 4], ids=["channel", "token"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
def test_a_number_is_at_most_half_a_step_away(bits, dtype, axis, offset, spread):
    x = torch.randn(1, 1, 2 * GROUP, 16, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    x = (x * spread + offset).to(dtype)
    assert error_in_steps(x, bits, axis).nan_to_num(0.0).max() <= 0.5


@in_every_width
@in_every_dtype
def test_the_least_is_exact_and_the_largest_is_reached(bits, dtype):
    """A scale that had been rounded down would leave the largest number up to half a code short."""
    x = torch.randn(1, 1, GROUP, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    codes, scales = quantised(x[:, :, None], bits, 3)
    exact = by_hand(codes.flatten(2, 3), scales.flatten(2, 3), 256)
    least = x.double().argmin(2, keepdim=True)
    assert torch.equal(exact.gather(2, least), x.double().gather(2, least))
    step, top = scales[:, :, 0, 0, :, 0].double(), x.double().amax(2)
    assert (step * (2**bits - 1) >= (top - x.double().amin(2)) * (1 - 1e-6)).all()
    assert ((exact.amax(2) - top).abs() <= step / 2 * (1 + 1e-6)).all()


@in_every_width
@in_every_dtype
@pytest.mark.parametrize("axis", [3, 4], ids=["channel", "token"])
def test_constant_groups_are_exact(bits, dtype, axis):
    values = torch.tensor([0.0, -0.1, 3.3, 1e-7, 60000.0], dtype=torch.float64).to(dtype)
    x = values[:, None, None, None, None].expand(5, 1, 1, GROUP, 8).contiguous()
    codes, scales = quantised(x, bits, axis)
    assert not codes.any() and not scales[..., 0].any()
    assert torch.equal(dequantised(codes.flatten(2, 3), scales.flatten(2, 3), 8), x.flatten(2, 3))


@in_every_width
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [3, 4], ids=["channel", "token"])
def test_a_number_that_is_not_finite_stays_in_its_group(bits, wrong, axis):
    x = torch.randn(1, 1, 3, GROUP, 8, generator=torch.Generator().manual_seed(0))
    clean = quantised(x, bits, axis)
    y = x.clone()
    y[0, 0, 1, 5, 3] = wrong
    good, bad = (
        dequantised(codes.flatten(2, 3), scales.flatten(2, 3), 8).unflatten(2, (3, GROUP))
        for codes, scales in (clean, quantised(y, bits, axis))
    )
    own = torch.zeros_like(x, dtype=torch.bool)
    own[(0, 0, 1, slice(None), 3) if axis == 3 else (0, 0, 1, 5)] = True
    assert torch.equal(bad[~own], good[~own]) and not bad[own].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_whole_range_of_a_dtype(dtype):
    largest = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 2)
    x = torch.linspace(-1, 1, GROUP).mul(largest).to(dtype)[None, None, None, :, None].repeat(1, 1, 1, 1, 4)
    for bits in BITS:
        codes, scales = quantised(x, bits, 3)
        assert scales.isfinite().all()
        far = (by_hand(codes.flatten(2, 3), scales.flatten(2, 3), 4) - x.flatten(2, 3).double()).abs()
        assert far.max() <= 0.5 * scales[..., 0].max().double() * (1 + 1e-6)


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("shared", ["channel", "token"])
def test_the_shape_of_the_scales_says_what_shares_them(groups, shared):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (2, 3, groups * GROUP, 4), generator=generator).to(torch.uint8)
    scales = torch.rand(2, 3, *((groups, 16) if shared == "channel" else (groups * GROUP, 1)), 2, generator=generator)
    got = dequantised(codes, scales, 16)
    assert got.shape == (2, 3, groups * GROUP, 16)
    torch.testing.assert_close(got.double(), by_hand(codes, scales, 16), rtol=1e-6, atol=1e-6)


def test_the_last_group_counts_though_it_is_not_full():
    assert [groups_of(tokens) for tokens in (0, 1, 63, 64, 65, 128)] == [0, 1, 1, 1, 2, 2]
