"""decode_attention against the float64 model, which knows logical tokens only and no buffers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import compare_kernels
from support.compare_kernels import DTYPES
from support.implementations import gpu_only, in_every_dtype, in_every_layout, only, triton_only

from zipvl_compile.kernels import decode_attention as module
from zipvl_compile.kernels.append_tokens import append_tokens
from zipvl_compile.kernels.common.masks import visible
from zipvl_compile.kernels.decode_attention import decode_attention
from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.token_positions import cached_positions

SHAPES = {  # batch, heads, kept, later tokens, new tokens, head_dim, value head_dim, mask
    "first-step": (1, "mha", 1, 1, 1, 16, 16, "none"),
    "gqa7": (3, "gqa7", 40, 5, 1, 60, 60, "padding"),
    "gqa4": (2, "gqa4", 500, 25, 1, 80, 80, "none"),
    "several-new": (3, "gqa7", 60, 9, 9, 16, 24, "padding"),
    "additive": (2, "gqa4", 60, 3, 2, 16, 16, "additive"),
    "per-head": (2, "mqa", 60, 3, 2, 16, 16, "per-head"),
    "head-256": (1, "mqa", 31, 2, 1, 256, 256, "none"),
}


@pytest.fixture
def few_programs(monkeypatch, implementation):
    """Let one program read all keys in the interpreter, which runs one after the other; SHAPES has the many parts."""
    if implementation.name == "interpreted":
        monkeypatch.setattr(module, "PROGRAMS", 1)


def inputs(cases, shape, dtype, seed=0):
    """Return the arguments of decode_attention; the prompt is twice as long as what it kept, spare rows are NaN."""
    batch, heads, kept, later, m, dim, value_dim, kind = shape
    prompt_length = 2 * kept
    n = prompt_length + later
    _, k, v = cases.qkv(batch, heads, kept + later + 3, dim, value_dim, dtype, seed)
    k[:, :, kept + later :], v[:, :, kept + later :] = float("nan"), float("nan")
    q = cases.qkv(batch, heads, m, dim, dtype=dtype, seed=seed + 1)[0]
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(batch, 1, prompt_length, generator=generator).argsort(-1)[..., :kept].sort(-1).values
    shown = torch.rand(batch, q.shape[1] if kind == "per-head" else 1, m, n, generator=generator) > 0.3
    shown[..., -1] = True
    mask = None if kind == "none" else shown[:, :, :1] if kind == "padding" else shown
    if kind == "additive":
        mask = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)
    return q, k, v, positions, prompt_length, n, mask


def fill(k, v, positions, prompt_length, steps):
    """Build the buffers as a model does: gather the prompt's kept tokens, then append; spare rows are NaN."""
    n, p = k.shape[2], positions.shape[2]
    keys, values = (gather_tokens(x[:, :, :prompt_length], positions, n - prompt_length + 3) for x in (k, v))
    keys[:, :, p:], values[:, :, p:] = float("nan"), float("nan")
    at, start = p, prompt_length
    for m in steps:
        append_tokens(keys, values, k[:, :, start : start + m], v[:, :, start : start + m], at)
        at, start = at + m, start + m
    assert start == n
    return keys, values


def check(implementation, paper, cases, q, k, v, positions, prompt_length, mask=None, scale=None):
    """Compare with the model, and the error with that of plain PyTorch; return the result."""
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    buffers = fill(k, v, positions, prompt_length, [1] * (n - prompt_length - m) + [m])
    out = implementation.run(decode_attention, q, *buffers, positions, prompt_length, n, mask, scale=scale)
    exact = torch.from_numpy(paper.decode(q, k, v, positions, prompt_length, mask=mask, scale=scale))
    groups = positions.shape[1]
    cached = torch.zeros(batch, groups, n, dtype=torch.bool).scatter_(2, positions, True)
    cached[..., prompt_length:] = True
    shown = cached.repeat_interleave(heads // groups, 1)[:, :, None].expand(-1, -1, m, -1)
    bias = shown
    if mask is not None and mask.dtype == torch.bool:
        bias = shown = shown & mask
    elif mask is not None:
        shown = shown & (mask > torch.finfo(mask.dtype).min)
        bias = torch.where(shown, mask, -torch.inf).to(q.dtype)
    plain = implementation.compute(cases.plain_attention, q, k, v, bias, False, scale)
    cases.assert_as_accurate(out, plain, exact, where=shown.any(-1, keepdim=True))
    assert out.isfinite().all()
    return out


def tail(mask, m):
    """Return the rows of the newest m queries of a prefill mask."""
    return None if mask is None else mask[:, :, -m:]


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(
    "mask",
    ["none", "left-padding", "additive-min", "additive-inf", "per-head-window", "per-head-bias"],
)
@in_every_layout
def test_every_mask_and_head_layout(implementation, heads, few_programs, paper, cases, mask, m):
    prompt, n, dtype = 17, 23, implementation.finest
    _, k, v = cases.qkv(batch=3, heads=heads, n=n, dim=8, value_dim=6, dtype=dtype)
    q = cases.qkv(batch=3, heads=heads, n=m, dim=8, dtype=dtype, seed=1)[0]
    mask_ = tail(cases.mask(mask, 3, q.shape[1], n, dtype), m)
    check(implementation, paper, cases, q, k, v, cases.choose(3, 1, prompt, 6), prompt, mask_)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("mask", ["none", "left-padding", "additive-min"])
@in_every_dtype
def test_every_dtype(implementation, dtype, few_programs, paper, cases, mask, m):
    _, k, v = cases.qkv(batch=2, n=140, dim=60, dtype=dtype)
    q = cases.qkv(batch=2, n=m, dim=60, dtype=dtype, seed=1)[0]
    mask_ = tail(cases.mask(mask, 2, 8, 140, dtype), m)
    out = check(implementation, paper, cases, q, k, v, cases.choose(2, 1, 129, 60), 129, mask_)
    assert out.dtype == dtype


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(("prompt", "p"), [(1, 1), (2, 1), (63, 63), (129, 1), (500, 200)])
@pytest.mark.parametrize("mask", ["none", "left-padding"])
def test_every_size_with_the_new_tokens_alone_after_the_prompt(
    implementation, few_programs, paper, cases, mask, prompt, p, m
):
    n, dtype = prompt + m, implementation.finest
    _, k, v = cases.qkv(batch=2, heads="mqa", n=n, dim=16, dtype=dtype)
    q = cases.qkv(batch=2, heads="mqa", n=m, dim=16, dtype=dtype, seed=1)[0]
    mask_ = tail(cases.mask(mask, 2, 4, n), m)
    check(implementation, paper, cases, q, k, v, cases.choose(2, 1, prompt, p), prompt, mask_)


@pytest.mark.parametrize("mask", ["none", "left-padding", "per-head-window"])
def test_positions_per_kv_head(implementation, few_programs, paper, cases, mask):
    dtype = implementation.finest
    _, k, v = cases.qkv(batch=2, heads="gqa4", n=23, dim=8, dtype=dtype)
    q = cases.qkv(batch=2, heads="gqa4", n=2, dim=8, dtype=dtype, seed=1)[0]
    check(implementation, paper, cases, q, k, v, cases.choose(2, 2, 17, 6), 17, tail(cases.mask(mask, 2, 8, 23), 2))


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("mask", ["none", "left-padding"])
def test_scale_of_the_model(implementation, few_programs, paper, cases, scale, mask):
    _, k, v = cases.qkv(n=23, dim=8, dtype=implementation.finest)
    q = cases.qkv(n=1, dim=8, dtype=implementation.finest, seed=1)[0]
    mask_ = tail(cases.mask(mask, 1, 8, 23), 1)
    check(implementation, paper, cases, q, k, v, cases.choose(1, 1, 17, 6), 17, mask_, scale=scale)


@pytest.mark.parametrize("m", [1, 5])
def test_a_sample_of_padding_only_gives_zero(implementation, cases, m):
    _, k, v = cases.qkv(batch=2, n=23, dim=8, dtype=implementation.finest)
    q = cases.qkv(batch=2, n=m, dim=8, dtype=implementation.finest, seed=1)[0]
    mask = torch.ones(2, 1, m, 23, dtype=torch.bool)
    mask[1] = False
    positions = cases.choose(2, 1, 17, 6)
    buffers = fill(k, v, positions, 17, [23 - 17])
    out = implementation.run(decode_attention, q, *buffers, positions, 17, 23, mask)
    assert out.isfinite().all() and out[0].any() and not out[1].any()


def test_output_is_token_major(implementation, few_programs, cases):
    _, k, v = cases.qkv(batch=2, n=23, dim=8, value_dim=6, dtype=implementation.finest)
    q = cases.qkv(batch=2, n=3, dim=8, dtype=implementation.finest)[0]
    positions = cases.choose(2, 1, 17, 6)
    buffers = fill(k, v, positions, 17, [6])
    for mask in (None, torch.ones(1, 1, 3, 23, dtype=torch.bool)):
        out = implementation.run(decode_attention, q, *buffers, positions, 17, 23, mask)
        assert out.transpose(1, 2).is_contiguous()


@only("torch")
def test_empty_batch(implementation):
    q, k, v = torch.ones(0, 4, 1, 8), torch.ones(0, 2, 9, 8), torch.ones(0, 2, 9, 5)
    out = implementation.run(decode_attention, q, k, v, torch.zeros(0, 1, 3, dtype=torch.int64), 6, 7)
    assert out.shape == (0, 4, 1, 5)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(prompt=st.integers(1, 20), later=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
@only("torch")
def test_how_the_tokens_arrived_does_not_matter(implementation, cases, prompt, later, seed):
    n = prompt + sum(later)
    _, k, v = cases.qkv(batch=2, n=n, dim=4, seed=seed)
    q = cases.qkv(batch=2, n=1, dim=4, seed=seed + 1)[0]
    positions = cases.choose(2, 1, prompt, max(1, prompt // 2), seed)
    few, one = (fill(k, v, positions, prompt, steps) for steps in (later, [1] * sum(later)))
    results = [implementation.run(decode_attention, q, *buffers, positions, prompt, n) for buffers in (few, one)]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@triton_only
def test_every_shape(implementation, cases, shape, dtype):
    out = compare_kernels.check(implementation, decode_attention, *inputs(cases, SHAPES[shape], dtype))
    assert out.transpose(1, 2).is_contiguous()


def as_static(given, more):
    """Return the arguments for buffers whose number of tokens is a tensor, with masks over `more` tokens to come.

    Rows to come hold finite numbers there, as a layer has them from the start.
    """
    q, k, v, positions, prompt_length, n, mask = given
    k, v = k.nan_to_num(7.0), v.nan_to_num(7.0)
    held, most = positions.shape[2] + n - prompt_length, n + more
    spare = k.shape[2] - held
    where = cached_positions(positions, prompt_length, n + spare)
    if mask is not None:
        mask = torch.cat([mask, mask[..., :1].expand(*mask.shape[:3], more)], -1)
    return (q, k, v, where, most, most, mask), {"held": torch.tensor(held)}


@pytest.mark.parametrize(
    ("programs", "more"), [(1, 5), (8, 5), (1024, 5), (8, 0)], ids=["one-part", "some-parts", "usual", "no-more"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_number_of_tokens_that_only_the_device_knows(implementation, cases, monkeypatch, shape, programs, more):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    given_ = inputs(cases, SHAPES[shape], implementation.finest)
    expected = implementation.run(decode_attention, *given_)
    arguments, counted = as_static(given_, more)
    got = implementation.run(decode_attention, *arguments, **counted)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    if implementation.name == "interpreted":
        return
    one_less = implementation.run(decode_attention, *arguments, held=counted["held"] - 1)
    assert not torch.equal(one_less, expected), "the tensor says it, not the size of the buffers"


@pytest.mark.parametrize("programs", [1, 8, 10_000], ids=["one-part", "some-parts", "all-parts"])
@triton_only
def test_parts_join_to_the_same(implementation, cases, monkeypatch, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    compare_kernels.check(implementation, decode_attention, *inputs(cases, SHAPES["gqa4"], torch.float32))


@pytest.mark.parametrize("kind", ["none", "additive"])
def test_softcap_and_scale(implementation, few_programs, paper, cases, kind):
    shape = (*SHAPES["additive"][:-1], kind)
    q, k, v, positions, prompt_length, n, mask = inputs(cases, shape, torch.float32)
    options = {"scale": 0.7, "softcap": 3.0}
    given_ = (q, k, v, positions, prompt_length, n, mask)
    got = compare_kernels.check(implementation, decode_attention, *given_, kernel=implementation.kernel, **options)
    full_k, full_v = (x.new_zeros(*x.shape[:2], n, x.shape[3]) for x in (k, v))
    for full, x in ((full_k, k), (full_v, v)):  # the model wants every logical token, and reads the cached ones
        rows = cached_positions(positions, prompt_length, n)[:, 0]
        for b in range(x.shape[0]):
            full[b, :, rows[b]] = x[b, :, : rows.shape[1]]
    exact = paper.decode(q, full_k, full_v, positions, prompt_length, mask=mask, **options)
    torch.testing.assert_close(got.double(), torch.from_numpy(exact), rtol=1e-5, atol=1e-5)


@triton_only
def test_a_token_that_sees_nothing_gets_zeros(implementation, cases):
    arguments = list(inputs(cases, SHAPES["gqa7"], torch.float32))
    arguments[-1][1] = False
    where = visible(arguments[-1]).any(-1, keepdim=True)
    out = compare_kernels.check(implementation, decode_attention, *arguments, where=where)
    assert not out[1].any() and out[0].any()


@triton_only
def test_keys_of_each_kv_head_stand_at_their_own_positions(implementation, cases):
    arguments = list(inputs(cases, (*SHAPES["per-head"][:1], "gqa4", *SHAPES["per-head"][2:]), torch.float32))
    other = torch.arange(60).expand(2, 1, -1)
    arguments[3] = torch.cat([arguments[3], other], 1)
    compare_kernels.check(implementation, decode_attention, *arguments)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(batch=st.integers(1, 3), heads=st.sampled_from(["mha", "gqa4", "gqa7"]), kept=st.integers(1, 150),
       later=st.integers(1, 9), dim=st.integers(1, 40), kind=st.sampled_from(["none", "padding"]),
       seed=st.integers(0, 99))  # fmt: skip
@triton_only
def test_any_shape(implementation, cases, batch, heads, kept, later, dim, kind, seed):
    shape = (batch, heads, kept, later, 1, dim, dim, kind)
    compare_kernels.check(implementation, decode_attention, *inputs(cases, shape, torch.float32, seed))


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "m"), [("gqa4", 1), ("gqa7", 3), ((40, 40), 1)], ids=str)
@gpu_only
def test_a_large_cache(implementation, cases, heads, m, dtype, kernel):
    kept, prompt_length, n = 3000, 8000, 8100
    _, k, v = cases.qkv(2, heads, kept + n - prompt_length + 28, 128, dtype=dtype)
    q = cases.qkv(2, heads, m, 128, dtype=dtype, seed=1)[0]
    where = cases.choose(2, 1, prompt_length, kept)
    mask = torch.rand(2, 1, 1, n, generator=torch.Generator().manual_seed(2)) > 0.3
    for given_ in (None, mask):
        arguments = (q, k, v, where, prompt_length, n, given_)
        compare_kernels.check(implementation, decode_attention, *arguments, kernel=kernel)


def test_cached_positions_are_the_kept_ones_and_every_later_one():
    kept = torch.tensor([[[0, 3]], [[1, 2]]])
    assert cached_positions(kept, 5, 7).tolist() == [[[0, 3, 5, 6]], [[1, 2, 5, 6]]]
    assert torch.equal(cached_positions(kept, 5, 5), kept)


Q, K, V = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 6)
P = torch.arange(3).repeat(2, 1, 1)
GOOD = {"q": Q, "keys": K, "values": V, "positions": P, "prompt_length": 6, "n": 8}
BAD = {
    "positions-rank": ({"positions": P[0]}, "positions: expected an int64 [batch, groups, kept] tensor"),
    "positions-batch": ({"positions": P[:1]}, "positions: expected batch 2"),
    "keys-room": ({"n": 12}, "keys: expected at least 9 cached tokens, got 5"),
    "keys-none": ({"n": 3}, "keys: expected at least 0 cached tokens, got 5"),
    "keys-batch": ({"keys": K[:1]}, "k: expected batch 2, like q, got 1"),
    "keys-dtype": ({"keys": K.half()}, "k: expected dtype torch.float32, like q, got torch.float16"),
    "values-heads": ({"values": V[:, :1]}, "v: expected heads and tokens [2, 5], like k, got [1, 5]"),
    "values-room": ({"values": V[:, :, :4]}, "v: expected heads and tokens [2, 5], like k, got [2, 4]"),
    "mask-physical": (
        {"mask": torch.ones(1, 1, 1, 5).bool()},
        "mask: expected a shape that broadcasts to [2, 4, 1, 8]",
    ),
    "mask-rank": (
        {"mask": torch.ones(1, 8).bool()},
        "mask: expected a [batch, heads, queries, keys] tensor, got [1, 8]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::decode_attention: ") as raised:
        decode_attention(**(GOOD | given_))
    assert message in str(raised.value)
    assert str(raised.value).endswith(".")
