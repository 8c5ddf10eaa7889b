"""What is particular to scoring in PyTorch: probe rows come in blocks, and where the blocks end changes nothing."""

import pytest
import torch

from zipvl_compile.kernels import token_scores_torch as module
from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.kernels.token_scores_torch import token_scores_torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("step", [1, 5, 30, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_every_probe_row_is_in_one_block_with_the_tokens_it_sees(causal, step):
    rows = probe_rows(65, 9, 21, 3)
    blocks = module._blocks(65, 9, 21, 3, CPU, causal, step)
    assert torch.cat([block.positions for block in blocks]).tolist() == rows.tolist()
    for block in blocks:
        assert block.positions.tolist() == rows[block.rows].tolist() and len(block.positions) <= step
        shown = torch.zeros(len(block.positions), 65, dtype=torch.bool)
        shown[:, : block.end] = True
        if block.hidden is not None:
            shown[:, block.first : block.end] &= ~block.hidden
        expected = torch.arange(65) <= block.positions[:, None] if causal else torch.ones_like(shown)
        assert torch.equal(shown, expected)


@pytest.mark.parametrize("mask", ["none", "left-padding", "per-head-bias"])
def test_the_size_of_the_blocks_does_not_matter(cases, monkeypatch, mask):
    q, k, _ = cases.qkv(batch=2, n=65, dim=8)
    arguments = (q, k, cases.mask(mask, 2, 8, 65), True, None, 3.0, 9, 21, 0, 2)
    whole = token_scores_torch(*arguments)
    monkeypatch.setattr(module, "BLOCK_SCORES", 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    torch.testing.assert_close(token_scores_torch(*arguments), whole, rtol=1e-12, atol=1e-12)
