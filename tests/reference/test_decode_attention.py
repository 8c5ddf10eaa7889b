"""decode_attention and append_tokens against the float64 model, which knows logical tokens only and no buffers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.kernels.append_tokens import append_tokens
from zipvl_compile.kernels.decode_attention import cached_positions, decode_attention
from zipvl_compile.kernels.gather_tokens import gather_tokens


def choose(batch, groups, prompt, p, seed=0):
    """Return p ascending positions per sample and group."""
    draw = torch.rand(batch, groups, prompt, generator=torch.Generator().manual_seed(seed))
    return draw.argsort(-1)[..., :p].sort(-1).values


def fill(k, v, positions, prompt, steps):
    """Build the buffers as a model does: gather the prompt's kept tokens, then append; spare rows are NaN."""
    n, p = k.shape[2], positions.shape[2]
    keys, values = (gather_tokens(x[:, :, :prompt], positions, n - prompt + 3) for x in (k, v))
    keys[:, :, p:], values[:, :, p:] = float("nan"), float("nan")
    at, start = p, prompt
    for m in steps:
        append_tokens(keys, values, k[:, :, start : start + m], v[:, :, start : start + m], at)
        at, start = at + m, start + m
    assert start == n
    return keys, values


def check(paper, cases, q, k, v, positions, prompt, mask=None, scale=None):
    """Compare with the model, and the error with that of plain PyTorch; return the result."""
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    keys, values = fill(k, v, positions, prompt, [1] * (n - prompt - m) + [m])
    out = decode_attention(q, keys, values, positions, prompt, n, mask, scale=scale)
    exact = torch.from_numpy(paper.decode(q, k, v, positions, prompt, mask=mask, scale=scale))
    groups = positions.shape[1]
    cached = torch.zeros(batch, groups, n, dtype=torch.bool).scatter_(2, positions, True)
    cached[..., prompt:] = True
    shown = cached.repeat_interleave(heads // groups, 1)[:, :, None].expand(-1, -1, m, -1)
    bias = shown
    if mask is not None and mask.dtype == torch.bool:
        bias = shown = shown & mask
    elif mask is not None:
        shown = shown & (mask > torch.finfo(mask.dtype).min)
        bias = torch.where(shown, mask, -torch.inf).to(q.dtype)
    plain = cases.plain_attention(q, k, v, bias, False, scale)
    cases.assert_as_accurate(out, plain, exact, where=shown.any(-1, keepdim=True))
    assert out.isfinite().all()
    return out


def tail(mask, m):
    """Return the rows of the newest m queries of a prefill mask."""
    return None if mask is None else mask[:, :, -m:]


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("heads", ["mha", "gqa4", "gqa7", "mqa"])
@pytest.mark.parametrize(
    "mask",
    ["none", "left-padding", "additive-min", "additive-inf", "per-head-window", "per-head-bias"],
)
def test_every_mask_and_head_layout(paper, cases, mask, heads, m):
    prompt, n = 17, 23
    _, k, v = cases.qkv(batch=3, heads=heads, n=n, dim=8, value_dim=6)
    q = cases.qkv(batch=3, heads=heads, n=m, dim=8, seed=1)[0]
    check(paper, cases, q, k, v, choose(3, 1, prompt, 6), prompt, tail(cases.mask(mask, 3, q.shape[1], n), m))


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "left-padding", "additive-min"])
def test_every_dtype(paper, cases, mask, dtype, m):
    _, k, v = cases.qkv(batch=2, n=140, dim=60, dtype=dtype)
    q = cases.qkv(batch=2, n=m, dim=60, dtype=dtype, seed=1)[0]
    out = check(paper, cases, q, k, v, choose(2, 1, 129, 60), 129, tail(cases.mask(mask, 2, 8, 140, dtype), m))
    assert out.dtype == dtype


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(("prompt", "p"), [(1, 1), (2, 1), (63, 63), (129, 1), (500, 200)])
@pytest.mark.parametrize("mask", ["none", "left-padding"])
def test_every_size_with_the_new_tokens_alone_after_the_prompt(paper, cases, mask, prompt, p, m):
    n = prompt + m
    _, k, v = cases.qkv(batch=2, heads="mqa", n=n, dim=16)
    q = cases.qkv(batch=2, heads="mqa", n=m, dim=16, seed=1)[0]
    check(paper, cases, q, k, v, choose(2, 1, prompt, p), prompt, tail(cases.mask(mask, 2, 4, n), m))


@pytest.mark.parametrize("mask", ["none", "left-padding", "per-head-window"])
def test_positions_per_kv_head(paper, cases, mask):
    _, k, v = cases.qkv(batch=2, heads="gqa4", n=23, dim=8)
    q = cases.qkv(batch=2, heads="gqa4", n=2, dim=8, seed=1)[0]
    check(paper, cases, q, k, v, choose(2, 2, 17, 6), 17, tail(cases.mask(mask, 2, 8, 23), 2))


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("mask", ["none", "left-padding"])
def test_scale_of_the_model(paper, cases, scale, mask):
    _, k, v = cases.qkv(n=23, dim=8)
    q = cases.qkv(n=1, dim=8, seed=1)[0]
    check(paper, cases, q, k, v, choose(1, 1, 17, 6), 17, tail(cases.mask(mask, 1, 8, 23), 1), scale=scale)


@pytest.mark.parametrize("m", [1, 5])
def test_a_sample_of_padding_only_gives_zero(cases, m):
    _, k, v = cases.qkv(batch=2, n=23, dim=8)
    q = cases.qkv(batch=2, n=m, dim=8, seed=1)[0]
    mask = torch.ones(2, 1, m, 23, dtype=torch.bool)
    mask[1] = False
    positions = choose(2, 1, 17, 6)
    keys, values = fill(k, v, positions, 17, [23 - 17])
    out = decode_attention(q, keys, values, positions, 17, 23, mask)
    assert out.isfinite().all() and out[0].any() and not out[1].any()


def test_output_is_token_major(cases):
    _, k, v = cases.qkv(batch=2, n=23, dim=8, value_dim=6)
    q = cases.qkv(batch=2, n=3, dim=8)[0]
    positions = choose(2, 1, 17, 6)
    keys, values = fill(k, v, positions, 17, [6])
    for mask in (None, torch.ones(1, 1, 3, 23, dtype=torch.bool)):
        assert decode_attention(q, keys, values, positions, 17, 23, mask).transpose(1, 2).is_contiguous()


def test_empty_batch():
    out = decode_attention(
        torch.ones(0, 4, 1, 8),
        torch.ones(0, 2, 9, 8),
        torch.ones(0, 2, 9, 5),
        torch.zeros(0, 1, 3, dtype=torch.int64),
        6,
        7,
    )
    assert out.shape == (0, 4, 1, 5)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(prompt=st.integers(1, 20), later=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_how_the_tokens_arrived_does_not_matter(cases, prompt, later, seed):
    n = prompt + sum(later)
    _, k, v = cases.qkv(batch=2, n=n, dim=4, seed=seed)
    q = cases.qkv(batch=2, n=1, dim=4, seed=seed + 1)[0]
    positions = choose(2, 1, prompt, max(1, prompt // 2), seed)
    few, one = (fill(k, v, positions, prompt, steps) for steps in (later, [1] * sum(later)))
    results = [decode_attention(q, *buffers, positions, prompt, n) for buffers in (few, one)]
    assert torch.equal(*results)


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


def buffers():
    return torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 5)


@pytest.mark.parametrize("m", [1, 3])
def test_append_writes_in_place_and_only_its_rows(m):
    keys, values = buffers()
    where = keys.data_ptr(), values.data_ptr()
    k, v = torch.rand(2, 2, m, 8) + 1, torch.rand(2, 2, m, 5) + 1
    append_tokens(keys, values, k, v, 2)
    assert (keys.data_ptr(), values.data_ptr()) == where
    assert torch.equal(keys[:, :, 2 : 2 + m], k) and torch.equal(values[:, :, 2 : 2 + m], v)
    for buffer in (keys, values):
        assert not buffer[:, :, :2].any() and not buffer[:, :, 2 + m :].any()


def test_append_fills_the_last_row():
    keys, values = buffers()
    append_tokens(keys, values, torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 5), 5)
    assert keys[:, :, 5].all() and values[:, :, 5].all()


REFUSED = {
    "no-room": ({"at": 5}, "room for 7 tokens"),
    "no-room-for-values": ({"values": torch.zeros(2, 2, 3, 5)}, "room for 4 tokens"),
    "before-the-buffer": ({"at": -1}, "at: expected"),
    "other-number-of-values": ({"v": torch.ones(2, 2, 1, 5)}, "v: expected"),
    "other-batch": ({"k": torch.ones(1, 2, 2, 8)}, "k: expected"),
    "other-heads": ({"v": torch.ones(2, 1, 2, 5)}, "v: expected"),
    "other-width": ({"v": torch.ones(2, 2, 2, 1)}, "v: expected"),
    "other-dtype": ({"k": torch.ones(2, 2, 2, 8, dtype=torch.float64)}, "k: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_append_refuses_what_does_not_fit_and_writes_nothing(name):
    given_, message = REFUSED[name]
    keys, values = buffers()
    good = {"keys": keys, "values": values, "k": torch.ones(2, 2, 2, 8), "v": torch.ones(2, 2, 2, 5), "at": 2}
    with pytest.raises(ValueError, match=r"^zipvl::append_tokens: ") as raised:
        append_tokens(**(good | given_))
    assert message in str(raised.value)
    assert not keys.any() and not values.any()
