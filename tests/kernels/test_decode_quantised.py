"""decode_quantised against the float64 model, which reads one cache of all logical tokens, dequantised by hand."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compare_kernels import DTYPES
from support.implementations import gpu_only, in_every_dtype, only, triton_only
from support.quantised import cache

from zipvl_compile.kernels import decode_attention as launches
from zipvl_compile.kernels.common import codes as common
from zipvl_compile.kernels.common.codes import BITS
from zipvl_compile.kernels.common.masks import visible
from zipvl_compile.kernels.decode_attention import decode_attention
from zipvl_compile.kernels.decode_quantised import decode_quantised

in_every_width = pytest.mark.parametrize("bits", BITS)


@pytest.fixture
def few_programs(monkeypatch, implementation):
    """Let one program read all tokens in the interpreter, which runs one after the other."""
    if implementation.name == "interpreted":
        monkeypatch.setattr(launches, "PROGRAMS", 1)


def check(implementation, paper, cases, whole, scale=None, softcap=None, kernel=None):
    """Compare with the model, and the error with that of plain PyTorch on the same numbers; return the result."""
    given_ = whole.given
    options = {"kernel": kernel} if kernel else {}
    out = implementation.run(decode_quantised, **given_, scale=scale, softcap=softcap, **options)
    q, mask = given_["q"], given_["mask"]
    mask = None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
    every = torch.arange(given_["prompt_length"]).expand(len(q), 1, -1)
    exact = paper.decode(q, whole.k, whole.v, every, given_["prompt_length"], mask=mask, scale=scale, softcap=softcap)
    k, v = (x.to(q.dtype) for x in (whole.k, whole.v))
    plain = torch.from_numpy(exact).to(q.dtype)
    if softcap is None:
        plain = implementation.compute(cases.plain_attention, q, k, v, mask, False, scale)
    where = None if mask is None else visible(mask).any(-1, keepdim=True).expand(*q.shape[:3], 1)
    cases.assert_as_accurate(out, plain, exact, where=where, unit=4.0)  # codes become numbers by two roundings more
    assert out.isfinite().all() and out.dtype == q.dtype
    return out


@in_every_width
@in_every_dtype
@pytest.mark.parametrize("mask", ["none", "row", "heads", "min"])
def test_every_dtype_and_width(implementation, dtype, few_programs, paper, cases, bits, mask):
    whole = cache(dtype=dtype, key_bits=bits, value_bits=bits, mask=mask)
    check(implementation, paper, cases, whole)


@pytest.mark.parametrize("mask", ["none", "row", "rows", "heads", "min", "inf"])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 8), (8, 4)])
def test_every_mask_and_group(implementation, few_programs, paper, cases, key_bits, value_bits, groups, m, mask):
    widths = {"key_bits": key_bits, "value_bits": value_bits, "dtype": implementation.finest}
    check(implementation, paper, cases, cache(3, groups=groups, m=m, mask=mask, **widths))


@pytest.mark.parametrize("others", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("kept", [1, 2, 70])
@pytest.mark.parametrize("mask", ["none", "row"])
def test_every_number_of_tokens(implementation, few_programs, paper, cases, kept, others, mask):
    whole = cache(kept=kept, others=others, mask=mask, value_bits=2, dtype=implementation.finest)
    check(implementation, paper, cases, whole)


SHAPES = st.fixed_dictionaries({
    "batch": st.integers(1, 3), "kept": st.integers(1, 90), "others": st.integers(0, 150), "later": st.integers(3, 6),
    "m": st.integers(1, 3), "key_bits": st.sampled_from(BITS), "value_bits": st.sampled_from(BITS),
    "mask": st.sampled_from(["none", "row", "rows", "heads", "min", "inf"]), "seed": st.integers(0, 99),
    "dim": st.integers(1, 12).map(lambda d: 4 * d), "value_dim": st.integers(1, 12).map(lambda d: 4 * d),
})  # fmt: skip
LAYOUTS = st.sampled_from([("mha", 1), ("mha", 2), ("gqa4", 1), ("gqa4", 2), ("gqa7", 1), ("gqa7", 2), ("mqa", 1)])
OPTIONS = st.sampled_from([(None, None), (0.7, 3.0), (0.3, None)])  # scale, softcap
QUIET = {"deadline": None, "derandomize": True, "database": None,
         "suppress_health_check": [HealthCheck.function_scoped_fixture]}  # fmt: skip


@settings(max_examples=100, **QUIET)
@given(shape=SHAPES, layout=LAYOUTS, options=OPTIONS, most=st.sampled_from([1, 1 << 18]))
@only("torch")
def test_any_cache(implementation, paper, cases, shape, layout, options, most):
    """`most` = 1 takes one group of tokens at a time."""
    heads, groups = layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "MOST", most)
        check(implementation, paper, cases, cache(heads=heads, groups=groups, **shape), *options)


@settings(max_examples=15, **QUIET)
@given(shape=SHAPES, layout=LAYOUTS, options=OPTIONS)
@triton_only
def test_any_cache_by_the_kernel(implementation, few_programs, paper, cases, shape, layout, options):
    heads, groups = layout
    check(implementation, paper, cases, cache(heads=heads, groups=groups, dtype=torch.float32, **shape), *options)


@pytest.mark.parametrize("programs", [1, 8, 10_000], ids=["one-part", "some-parts", "all-parts"])
@triton_only
def test_parts_join_to_the_same(implementation, paper, cases, monkeypatch, programs):
    monkeypatch.setattr(launches, "PROGRAMS", programs)
    whole = cache(1, kept=200, others=300, later=5, mask="row", dtype=torch.float32)
    check(implementation, paper, cases, whole)


@pytest.mark.parametrize(("dim", "value_dim", "bits"), [(256, 256, 2), (8, 60, 2), (80, 8, 4), (3, 5, 8)])
def test_every_head_width(implementation, few_programs, paper, cases, dim, value_dim, bits):
    widths = {"dim": dim, "value_dim": value_dim, "key_bits": bits, "value_bits": bits}
    check(implementation, paper, cases, cache(1, **widths, dtype=implementation.finest))


def test_what_is_outside_the_codes_is_not_read(implementation, few_programs, cases):
    """Rows that fill the last group up are no tokens."""
    given_ = cache(others=70, dtype=implementation.finest).given
    expected = implementation.run(decode_quantised, **given_)
    for name in ("key_codes", "value_codes"):
        given_[name][:, :, 70:] = 255
    assert torch.equal(implementation.run(decode_quantised, **given_), expected)
    given_["key_codes"][:, :, 69] ^= 255
    assert not torch.equal(implementation.run(decode_quantised, **given_), expected), "the last token is real"


def test_without_others_it_is_decode_attention(implementation, few_programs):
    given_ = cache(others=0, mask="row", dtype=implementation.finest).given
    shared = {name: x for name, x in given_.items() if "codes" not in name and "scales" not in name}
    expected = implementation.run(decode_attention, **shared)
    torch.testing.assert_close(implementation.run(decode_quantised, **given_), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("m", [1, 3])
def test_a_sample_of_padding_only_gives_zero(implementation, few_programs, m):
    given_ = cache(m=m, dtype=implementation.finest).given
    given_["mask"] = torch.ones(2, 1, m, given_["n"], dtype=torch.bool)
    given_["mask"][1] = False
    out = implementation.run(decode_quantised, **given_)
    assert out.isfinite().all() and out[0].any() and not out[1].any()


@pytest.mark.parametrize("hidden", ["cached", "others"])
@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -torch.inf], ids=["min", "inf"])
def test_a_token_may_see_one_kind_alone(implementation, few_programs, paper, cases, hidden, low):
    whole = cache(dtype=torch.float32)
    given_ = whole.given
    cached = torch.zeros(2, given_["n"], dtype=torch.bool).scatter_(1, given_["positions"][:, 0], True)
    cached[:, given_["prompt_length"] :] = True
    hide = cached if hidden == "cached" else ~cached
    given_["mask"] = torch.zeros(2, 1, 1, given_["n"]).masked_fill(hide[:, None, None], low)
    check(implementation, paper, cases, whole)


def test_output_is_token_major(implementation, few_programs):
    for mask in ("none", "rows"):
        out = implementation.run(decode_quantised, **cache(m=3, mask=mask, dtype=implementation.finest).given)
        assert out.transpose(1, 2).is_contiguous()


@only("torch")
def test_empty_batch(implementation):
    given_ = cache().given
    empty = {name: x[:0] if isinstance(x, torch.Tensor) else x for name, x in given_.items()}
    assert implementation.run(decode_quantised, **empty).shape == (0, 8, 1, 24)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@in_every_width
@pytest.mark.parametrize(
    ("heads", "m", "mask"), [("gqa4", 1, "none"), ("gqa7", 3, "row"), ((40, 40), 1, "row")], ids=str
)
@gpu_only
def test_a_large_cache(implementation, paper, cases, heads, m, mask, bits, dtype, kernel):
    whole = cache(2, heads, 1, 1000, 3000, 100, m, 128, 128, bits, bits, mask, dtype)
    check(implementation, paper, cases, whole, kernel=kernel)


GOOD = cache(others=70, dtype=torch.float32).given  # two groups of 16 and 24 channels
CODES, SCALES = GOOD["key_codes"], GOOD["key_scales"]
BAD = {
    "positions": ({"positions": GOOD["positions"][0]}, "positions: expected an int64 [batch, groups, kept] tensor"),
    "room": ({"n": 200}, "keys: expected at least 130 cached tokens, got 26"),
    "prompt": ({"prompt_length": 19, "n": 22}, "positions: expected at most 19 kept tokens, the prompt, got 20."),
    "codes-dtype": ({"key_codes": CODES.int()}, "key_codes: expected a uint8 [batch, heads, tokens, bytes] tensor of "),
    "codes-width": ({"key_codes": CODES[..., :5]}, "of 16 or 8 or 4 bytes a token, got torch.uint8 [2, 2, 128, 5]."),
    "codes-heads": ({"key_codes": CODES[:, :1]}, "expected batch, heads and tokens [2, 2, 128], got [2, 1, 128]."),
    "codes-tokens": ({"value_codes": GOOD["value_codes"][:, :, :64]}, "value_codes: expected batch, heads and tokens"),
    "scales-dtype": ({"key_scales": SCALES.half()}, "scales of key_codes: expected torch.float32 [2, 2, 2, 16, 2]"),
    "scales-rule": (
        {"key_scales": GOOD["value_scales"]},
        "scales of key_codes: expected torch.float32 [2, 2, 2, 16, 2], got torch.float32 [2, 2, 128, 1, 2].",
    ),
    "value-scales-rule": (
        {"value_scales": torch.ones(2, 2, 2, 24, 2)},
        "scales of value_codes: expected torch.float32 [2, 2, 128, 1, 2], got torch.float32 [2, 2, 2, 24, 2].",
    ),
    "mask": ({"mask": torch.ones(1, 1, 1, 23).bool()}, "mask: expected a shape that broadcasts to [2, 8, 1, 93]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@only("torch", "interpreted")
def test_wrong_input_is_named(implementation, name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::decode_quantised: ") as raised:
        decode_quantised(**(GOOD | given_), kernel=implementation.kernel)
    assert message in str(raised.value) and str(raised.value).endswith(".")
