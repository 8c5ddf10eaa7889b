"""Padded batches sample by sample: the spans, and the same numbers as by the mask."""

import pytest
import torch
from support.cases import choose, padding

from zipvl_compile.kernels import ragged_attention
from zipvl_compile.kernels.ragged_attention import attend_ragged, is_ragged, spans
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.sparse_attention_torch import attend_torch

N, P = 40, 15


def real(side):
    """Return which tokens of two samples are no padding."""
    shown = padding(2, N, side if side in ("left", "right") else "left")
    if side == "all of one":
        shown[1] = False
    if side == "hole":
        shown[1, 10:30] = False
    return shown


def test_spans():
    positions = torch.tensor([[[0, 2, 4, 6]], [[1, 3, 5, 7]]])
    shown = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    assert spans(shown, positions) == [(0, 4), (0, 4)]
    shown[0, ..., :3] = False
    shown[1, ..., 6:] = False
    assert spans(shown, positions) == [(2, 4), (0, 3)]
    shown[1] = False
    assert spans(shown, positions) == [(2, 4), (0, 0)]
    shown[1, ..., [1, 7]] = True
    assert spans(shown, positions) is None
    assert spans(shown[:1], positions) == [(2, 4), (1, 4)], "one row for all samples"


@pytest.mark.parametrize("few", [False, True], ids=["all queries", "kept queries"])
@pytest.mark.parametrize("side", ["left", "right", "all of one", "hole"])
def test_the_same_numbers_as_by_the_mask(cases, side, few):
    q, k, v = cases.qkv(batch=2, n=N, dim=8, value_dim=6)
    positions, mask = choose(2, 1, N, P), real(side)[:, None, None]
    kept = [x.gather(2, positions[..., None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)]
    if few:
        q = q.gather(2, positions[..., None].expand(-1, q.shape[1], -1, 8))
    expected = attend_torch(q, *kept, positions, mask, True, 0.4, None, False)
    got = attend_ragged(q, *kept, positions, mask, 0.4)
    assert got.shape == expected.shape and got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_padded_batch_needs_no_mask(cases, monkeypatch):
    masks = []
    attend = ragged_attention.dense_attention
    monkeypatch.setattr(ragged_attention, "dense_attention", lambda *given: masks.append(given[3]) or attend(*given))
    q, k, v = cases.qkv(batch=2, n=N, dim=8)
    positions = choose(2, 1, N, P)
    sparse_attention(q, k[:, :, :P], v[:, :, :P], positions, real("left")[:, None, None])
    assert masks == [None, None]


def test_which_masks_may_be_padding():
    positions, row = torch.zeros(2, 1, 3, dtype=torch.int64), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert is_ragged(row, positions, True, None)
    assert not is_ragged(None, positions, True, None) and not is_ragged(row.float(), positions, True, None)
    assert not is_ragged(row.expand(-1, 4, -1, -1), positions, True, None)
    assert not is_ragged(row.expand(-1, -1, 9, -1), positions, True, None)
    assert not is_ragged(row, positions, False, None) and not is_ragged(row, positions, True, 2.0)
    assert not is_ragged(row, positions.expand(-1, 2, -1), True, None)
