"""The keys near each row: blocks that end with the prompt, and what each row sees of their keys."""

import pytest
import torch

from zipvl_compile.kernels.near_keys import NearKeys
from zipvl_compile.kernels.window_attention_torch import first_visible


@pytest.mark.parametrize("size", [1, 3, 8, 50])
@pytest.mark.parametrize("window", [1, 4, 40])
@pytest.mark.parametrize("first", [0, 5, 19])
@pytest.mark.parametrize("mask", [None, "row", "full"])
def test_each_row_sees_its_window_and_the_sinks_once(mask, first, window, size):
    """Keys carry their position: what a block shows of them is compared with sets."""
    n, batch, generator = 20, 2, torch.Generator().manual_seed(0)
    visible = torch.ones(batch, n)
    visible[0, :6] = 0
    k = torch.arange(n, dtype=torch.float64)[None, None, :, None].expand(batch, 1, n, 1)
    shown = {"row": visible[:, None, None] > 0, "full": torch.rand(batch, 1, n, n, generator=generator) < 0.5}.get(mask)
    near = NearKeys(k, k, first_visible(visible, 3), window, first, size)
    rows = []
    for block in near.blocks(near.shown, shown):
        for i, row in enumerate(range(block.rows.start, block.rows.stop)):
            rows.append(row)
            for b in range(batch):
                seen = block.k[b, 0, :, 0][block.mask.expand(batch, -1, -1, -1)[b, 0, i]].int().tolist()
                real = visible[b].nonzero().flatten().tolist()
                expected = {j for j in range(n) if row - window < j <= row} | {j for j in real[:3] if j <= row}
                if shown is not None:
                    expected &= set(shown[b, 0].expand(n, n)[row].nonzero().flatten().tolist())
                assert sorted(seen) == sorted(expected), "each once"
    assert rows == list(range(first, n))


def test_what_is_said_of_tokens_is_read_at_rows_and_keys():
    k = torch.zeros(2, 1, 10, 1)
    near = NearKeys(k, k, torch.tensor([[0], [3]]), 2, 0, 4)
    flags = torch.arange(20).view(2, 1, 10)
    rows, columns = near.at_rows(flags), near.at_columns(flags)
    assert rows.shape == (2, 1, 3, 4, 1) and columns.shape == (2, 1, 3, 1, 6)
    assert rows[1, 0, 2, :, 0].tolist() == [16, 17, 18, 19]
    assert columns[1, 0, 2, 0].tolist() == [15, 16, 17, 18, 19, 13], "the slice, then the sink"
