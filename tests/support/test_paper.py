"""The float64 model of the paper against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from support import paper

LOG3 = math.log(3.0)


def test_scores_of_two_tokens_by_hand():
    # Row 0 sees token 0 only. Row 1: scores 0 and log 3, weights 1/4 and 3/4.
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [LOG3]]]])
    accumulated, visible = paper.scores(q, k, torch.arange(2), scale=1.0)
    assert accumulated[0, 0] == pytest.approx([1.25, 0.75])
    assert visible[0].tolist() == [2, 1]


def test_normalised_score_and_not_accumulated_score_ranks():
    # Two of three reach 0.8 of 9: 5 + 3. Normalised 5/9, 3/3, 1/1, and the newest always stays: {1, 2}, not {0, 1}.
    accumulated, visible = np.array([[[5.0, 3.0, 1.0]]]), np.array([[9.0, 3.0, 1.0]])
    assert paper.fewest(accumulated[0, 0], 0.8) == 2
    assert paper.selection(accumulated, visible, tau=0.8).tolist() == [[[1, 2]]]


def test_a_batch_keeps_the_count_of_its_neediest_sample():
    accumulated = np.array([[[4.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]])
    visible = np.full((2, 4), 4.0)
    assert paper.selection(accumulated, visible, tau=0.7).tolist() == [[[0, 1, 3]], [[0, 1, 3]]]


def test_protected_tokens_come_on_top_of_the_papers():
    accumulated, visible = np.array([[[6.0, 0.0, 3.0, 0.0, 1.0, 0.0]]]), np.full((1, 6), 4.0)
    assert paper.selection(accumulated, visible, tau=0.9).tolist() == [[[0, 5]]]
    assert paper.selection(accumulated, visible, tau=0.9, keep_recent=2).tolist() == [[[0, 4, 5]]]
    assert paper.selection(accumulated, visible, keep_ratio=1 / 6, keep_recent=3).tolist() == [[[3, 4, 5]]]
    # Three tokens of the paper, 0, 5 and 7; of the four protected ones 5 is among them, so the next best, 1, stays too.
    accumulated, visible = np.array([[[6.0, 1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0]]]), np.full((1, 8), 4.0)
    assert paper.selection(accumulated, visible, tau=0.95, keep_recent=4).tolist() == [[[0, 1, 4, 5, 6, 7]]]


def test_newest_visible_token_is_kept_under_right_padding():
    accumulated, visible = np.array([[[6.0, 2.0, 0.0, 0.0]]]), np.array([[4.0, 3.0, 2.0, 0.0]])
    assert paper.selection(accumulated, visible, tau=0.75).tolist() == [[[2]]]
    assert paper.selection(accumulated, visible, tau=0.76).tolist() == [[[0, 2]]]


def test_kept_queries_attend_to_kept_keys_only():
    q = torch.ones(1, 1, 3, 1)
    k = torch.tensor([[[[0.0], [5.0], [LOG3]]]])
    v = torch.tensor([[[[4.0], [100.0], [8.0]]]])
    kept = torch.tensor([[[0, 2]]])
    assert paper.attention(q, k, v, kept, scale=1.0).flatten() == pytest.approx([4, 0, 7])
    assert paper.attention(q, k, v, kept, scale=1.0, queries="all").flatten() == pytest.approx([4, 4, 7])


def test_decode_sees_kept_prompt_tokens_and_every_later_token():
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([[[[0.0], [50.0], [LOG3], [LOG3]]]])
    v = torch.tensor([[[[7.0], [100.0], [14.0], [0.0]]]])
    kept = torch.tensor([[[0, 2]]])  # of a prompt of three
    assert paper.decode(q, k, v, kept, 3, scale=1.0).item() == pytest.approx(7.0)
    hide_first = torch.tensor([[[[False, True, True, True]]]])
    assert paper.decode(q, k, v, kept, 3, mask=hide_first, scale=1.0).item() == pytest.approx(7.0)
    hide_third = torch.tensor([[[[True, True, False, True]]]])
    assert paper.decode(q, k, v, kept, 3, mask=hide_third, scale=1.0).item() == pytest.approx(7 / 4)
