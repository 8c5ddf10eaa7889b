"""Parts of select_tokens in PyTorch."""

import torch

from zipvl_compile.kernels.select_tokens_torch import best_tokens, fewest_tokens, protect


def test_what_is_protected_ranks_with_the_newest():
    scores_, visible = torch.rand(2, 1, 6), torch.tensor([[0.0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = protect(scores_, visible, 2, torch.tensor([-1]))
    assert found.isinf().int().tolist() == [[[0, 0, 1, 1, 0, 1]], [[1, 1, 0, 0, 0, 1]]]
    assert torch.equal(found[~found.isinf()], scores_[~found.isinf()])


def test_fewest_and_best_by_hand():
    scores_, visible = torch.tensor([[[4.0, 2, 1, 1]]]), torch.tensor([[4.0, 1, 1, 1]])
    assert fewest_tokens(scores_, 0.75).tolist() == [[2]]
    assert best_tokens(scores_, visible, 2, 1, normalise=False).tolist() == [[[0, 3]]]
    assert best_tokens(scores_, visible, 2, 1, normalise=True).tolist() == [[[1, 3]]]
    assert scores_.tolist() == [[[4, 2, 1, 1]]], "the scores are the caller's"
