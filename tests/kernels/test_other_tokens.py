"""other_tokens: what is outside the kept positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.kernels.other_tokens import other_tokens


@pytest.mark.parametrize(
    ("kept", "others"),
    [([0, 2, 3], [1, 4]), ([], [0, 1, 2, 3, 4]), ([0, 1, 2, 3, 4], []), ([4], [0, 1, 2, 3]), ([0, 1], [2, 3, 4])],
)
def test_by_hand(kept, others):
    positions = torch.tensor(kept, dtype=torch.int64)[None, None]
    found = other_tokens(positions, 5)
    assert found.dtype == torch.int64 and found.tolist() == [[others]]


@settings(deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 99), groups=st.integers(1, 3), batch=st.integers(1, 3))
def test_any_positions(n, seed, groups, batch):
    generator = torch.Generator().manual_seed(seed)
    p = int(torch.randint(0, n + 1, (1,), generator=generator))
    kept = torch.stack([torch.randperm(n, generator=generator)[:p].sort().values for _ in range(batch * groups)])
    found = other_tokens(kept.view(batch, groups, p), n)
    assert found.shape == (batch, groups, n - p)
    for positions, others in zip(kept.tolist(), found.view(batch * groups, n - p).tolist(), strict=True):
        assert others == sorted(set(range(n)) - set(positions))


def test_positions_of_any_strides():
    positions = torch.tensor([[[0, 9, 2, 9, 3, 9]]])[..., ::2]
    assert other_tokens(positions, 5).tolist() == [[[1, 4]]]
    assert other_tokens(positions.expand(2, 3, -1), 5).tolist() == [[[1, 4]] * 3] * 2


def test_a_number_of_kept_tokens_that_only_the_data_knows(unbacked):
    shown = torch.tensor([True, False, True, False, False])
    step = unbacked(lambda shown: torch.ops.zipvl.other_tokens(shown.nonzero().view(1, 1, -1), shown.shape[0]))
    assert step(shown).tolist() == [[[1, 3, 4]]]
    assert step(~shown).tolist() == [[[0, 2]]]


@pytest.mark.parametrize(
    ("positions", "n", "message"),
    [
        (torch.arange(3), 5, "positions: expected an int64 [batch, groups, kept] tensor, got torch.int64 [3]"),
        (torch.ones(1, 1, 3), 5, "positions: expected an int64 [batch, groups, kept] tensor, got torch.float32"),
        (torch.arange(3)[None, None], 2, "positions: expected at most 2 kept tokens, the prompt, got 3."),
    ],
)
def test_wrong_input_is_named(positions, n, message):
    with pytest.raises(ValueError, match=r"^zipvl::other_tokens: ") as raised:
        other_tokens(positions, n)
    assert message in str(raised.value)
