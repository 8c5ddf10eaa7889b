"""gather_tokens and gather_kv: the cache gets a copy of exactly the kept tokens, in memory of its own, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare_kernels import DTYPES, SHAPES, inputs
from support.implementations import gpu_only, in_every_dtype, only, triton_only

from zipvl_compile.kernels.gather_tokens import gather_kv, gather_tokens


def numbered(batch, heads, n, width, dtype=torch.float64):
    """Return x where every number says where it stands."""
    return torch.arange(batch * heads * n * width, dtype=torch.float64).view(batch, heads, n, width).to(dtype)


@pytest.mark.parametrize("spare", [0, 1, 7])
@pytest.mark.parametrize("groups", [1, 2, 4])
@in_every_dtype
def test_rows_are_those_at_the_positions(implementation, dtype, cases, groups, spare):
    x, positions = numbered(3, 4, 9, 5, dtype), cases.choose(3, groups, 9, 4)
    out = implementation.run(gather_tokens, x, positions, spare)
    assert out.shape == (3, 4, 4 + spare, 5) and out.dtype == dtype
    assert not out[:, :, 4:].any(), "spare rows are zeros"
    for b in range(3):
        for h in range(4):
            for i, j in enumerate(positions[b, h * groups // 4].tolist()):
                assert torch.equal(out[b, h, i], x[b, h, j])


@pytest.mark.parametrize("p", [1, 4, 9], ids=["one", "some", "all"])
@pytest.mark.parametrize("spare", [0, 3])
def test_memory_is_its_own_and_has_no_more_than_the_kept_and_spare_rows(implementation, p, spare):
    x, positions = implementation.given(numbered(2, 2, 9, 4, implementation.finest), torch.arange(p).repeat(2, 1, 1))
    out = gather_tokens(x, positions, spare, implementation.kernel)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert out.untyped_storage().nbytes() == 2 * 2 * (p + spare) * 4 * x.element_size()
    assert out.is_contiguous()
    x.zero_()
    assert out[:, :, :p].any(), "a copy, not a view"


def test_slice_of_a_larger_tensor_and_strided_input(implementation):
    x = numbered(2, 9, 3, 4, implementation.finest).transpose(1, 2)  # token-major, as the models lay it out
    positions = torch.tensor([[[0, 2, 8]], [[1, 2, 3]]])
    out = implementation.run(gather_tokens, x, positions)
    assert torch.equal(out[0], x[0][:, [0, 2, 8]]) and torch.equal(out[1], x[1][:, [1, 2, 3]])
    assert out.is_contiguous()


@pytest.mark.parametrize(("batch", "p"), [(0, 3), (2, 0)], ids=["no-sample", "no-position"])
def test_empty(implementation, batch, p):
    x, positions = torch.ones(batch, 2, 5, 4), torch.zeros(batch, 1, p, dtype=torch.int64)
    assert implementation.run(gather_tokens, x, positions, 2).shape == (batch, 2, p + 2, 4)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 30), data=st.data())
def test_gathering_twice_is_gathering_the_composition(implementation, n, data):
    x = numbered(1, 2, n, 3, implementation.finest)
    first = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    second = sorted(data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1)))
    once = implementation.run(gather_tokens, x, torch.tensor([[first]]))
    twice = implementation.run(gather_tokens, once, torch.tensor([[second]]))
    together = torch.tensor([[[first[i] for i in second]]])
    assert torch.equal(twice, implementation.run(gather_tokens, x, together))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("n", "p"), [(1, 1), (63, 1), (63, 63), (500, 180)])
def test_keys_and_values_at_once(implementation, cases, n, p, groups, dtype):
    _, k, v = cases.qkv(batch=3, n=n, dim=60, value_dim=80, dtype=dtype)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # as models lay it out
    positions = cases.choose(3, groups, n, p, seed=n)
    keys, values = implementation.run(gather_kv, k, v, positions, 5)
    for x, out in ((k, keys), (v, values)):
        assert out.shape[2] == p + 5 and out.is_contiguous()
        expected = gather_tokens(x, positions, 0, "torch")
        assert torch.equal(out[:, :, :p], expected)
        assert torch.equal(implementation.run(gather_tokens, x, positions, 0), expected)
        assert (out[:, :, p:] == 0).all(), "spare rows are zeros"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@gpu_only
def test_every_shape(implementation, cases, shape, dtype):
    _, k, v, _, _, p = inputs(shape, dtype)
    positions = cases.choose(k.shape[0], 1, k.shape[2], p)
    for out, x in zip(implementation.run(gather_kv, k, v, positions, 4), (k, v), strict=True):
        assert torch.equal(out[:, :, :p], gather_tokens(x, positions))


X, P = torch.ones(2, 4, 6, 8), torch.zeros(2, 1, 3, dtype=torch.int64)
BAD = {
    "x-rank": ({"x": X[0]}, "x: expected a [batch, heads, tokens, head_dim] tensor, got [4, 6, 8]"),
    "positions-rank": ({"positions": P[0]}, "positions: expected an int64 [batch, groups, kept] tensor"),
    "positions-dtype": ({"positions": P.int()}, "positions: expected an int64 [batch, groups, kept] tensor"),
    "positions-batch": ({"positions": P[:1]}, "positions: expected batch 2 and a group count that divides 4 heads"),
    "positions-groups": ({"positions": P.expand(2, 3, 3)}, "got [2, 3, 3]"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::gather_tokens: ") as raised:
        gather_tokens(**({"x": X, "positions": P} | given_))
    assert message in str(raised.value)
    assert str(raised.value).endswith(".")


def test_keys_and_values_of_other_tokens_are_no_pair():
    with pytest.raises(ValueError, match=r"^zipvl::gather_kv: v: expected batch, heads and tokens \[2, 4, 6\], like k"):
        gather_kv(X, X[:, :, :5], P)


@pytest.mark.parametrize("bad", [6, -1])
@only("torch")
def test_position_outside_the_prompt_is_an_error(implementation, bad):
    with pytest.raises(IndexError, match="out of range"):
        implementation.run(gather_tokens, X, torch.full_like(P, bad))


@pytest.mark.parametrize("bad", [9, -1])
@triton_only
def test_position_outside_the_prompt_is_seen_at_once(implementation, cases, bad):
    _, k, _ = cases.qkv(n=9, dim=8, dtype=torch.float32)
    out = implementation.run(gather_tokens, k, torch.tensor([[[1, bad]]]), 0)
    assert out[:, :, 1].isnan().all() and torch.equal(out[:, :, 0], k[:, :, 1])
