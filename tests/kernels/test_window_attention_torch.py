"""What is particular to window_attention by PyTorch: the first visible tokens."""

import torch

from zipvl_compile.kernels.window_attention_torch import first_visible, kept_tokens


def test_first_visible_tokens():
    visible = torch.tensor([[0.0, 0, 3, 0, 1, 1], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    assert first_visible(visible, 2).tolist() == [[2, 4], [0, 1], [5, 6], [6, 6]]
    assert first_visible(visible > 0, 0).shape == (4, 0)
    assert first_visible(visible[:, :3], 9).tolist() == [[2, 3, 3], [0, 1, 2], [3, 3, 3], [3, 3, 3]]


def test_kept_tokens():
    assert kept_tokens(torch.tensor([[[0, 3], [1, 2]]]), 4).int().tolist() == [[[1, 0, 0, 1], [0, 1, 1, 0]]]
