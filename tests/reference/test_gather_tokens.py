"""gather_tokens and token_positions: the cache gets a copy of exactly the kept tokens, in memory of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.token_positions import token_positions

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def numbered(batch, heads, n, width, dtype=torch.float64):
    """Return x where every number says where it stands."""
    return torch.arange(batch * heads * n * width, dtype=torch.float64).view(batch, heads, n, width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spare", [0, 1, 7])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_are_those_at_the_positions(groups, spare, dtype):
    x = numbered(3, 4, 9, 5, dtype)
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(3, groups, 9, generator=generator).argsort(-1)[..., :4].sort(-1).values
    out = gather_tokens(x, positions, spare)
    assert out.shape == (3, 4, 4 + spare, 5) and out.dtype == dtype
    assert not out[:, :, 4:].any(), "spare rows are zeros"
    for b in range(3):
        for h in range(4):
            for i, j in enumerate(positions[b, h * groups // 4].tolist()):
                assert torch.equal(out[b, h, i], x[b, h, j])


@pytest.mark.parametrize("p", [1, 4, 9], ids=["one", "some", "all"])
@pytest.mark.parametrize("spare", [0, 3])
def test_memory_is_its_own_and_has_no_more_than_the_kept_and_spare_rows(p, spare):
    x = numbered(2, 2, 9, 4)
    out = gather_tokens(x, torch.arange(p).repeat(2, 1, 1), spare)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert out.untyped_storage().nbytes() == 2 * 2 * (p + spare) * 4 * 8
    assert out.is_contiguous()
    x.zero_()
    assert out[:, :, :p].any(), "a copy, not a view"


def test_slice_of_a_larger_tensor_and_strided_input():
    x = numbered(2, 9, 3, 4).transpose(1, 2)  # token-major, as the models lay it out
    positions = torch.tensor([[[0, 2, 8]], [[1, 2, 3]]])
    out = gather_tokens(x, positions)
    assert torch.equal(out[0], x[0][:, [0, 2, 8]]) and torch.equal(out[1], x[1][:, [1, 2, 3]])
    assert out.is_contiguous()


@pytest.mark.parametrize(("batch", "p"), [(0, 3), (2, 0)], ids=["no-sample", "no-position"])
def test_empty(batch, p):
    assert gather_tokens(torch.ones(batch, 2, 5, 4), torch.zeros(batch, 1, p, dtype=torch.int64), 2).shape == (
        batch,
        2,
        p + 2,
        4,
    )


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 30), data=st.data())
def test_gathering_twice_is_gathering_the_composition(n, data):
    x = numbered(1, 2, n, 3)
    first = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    second = sorted(data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1)))
    twice = gather_tokens(gather_tokens(x, torch.tensor([[first]])), torch.tensor([[second]]))
    assert torch.equal(twice, gather_tokens(x, torch.tensor([[[first[i] for i in second]]])))


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


@pytest.mark.parametrize("bad", [6, -1])
def test_position_outside_the_prompt_is_an_error(bad):
    with pytest.raises(IndexError, match="out of range"):
        gather_tokens(X, torch.full_like(P, bad))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_token_positions_names_every_token(n):
    positions = token_positions(torch.ones(3, 2, n, 4, dtype=torch.bfloat16))
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[list(range(n))]] * 3
    assert positions.numel() == 0 or positions.untyped_storage().nbytes() == 3 * n * 8, "real memory, not an expand"
