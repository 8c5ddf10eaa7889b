"""Scores of tokens as integers, whose sum does not depend on the order in which parts are added.

Ranks add up the scores of their heads in an order that the communication library chooses. As integers the sums are
equal on all ranks to the last bit, however it adds, so that no two ranks ever keep different tokens.
"""

from __future__ import annotations

import torch

FIXED = float(2**40)  # of a probe row's attention, which is 1


def _beyond(terms: int) -> int:
    """Return the integer that stands for what is not finite: `terms` of them are still an int64."""
    return 2**62 // terms


def to_fixed_point(scores: torch.Tensor, terms: int) -> torch.Tensor:
    """Return scores in units of 2^-40, rounded up: int64, as many. What is above 0 stays above 0.

    Args:
        scores: floating, not negative, infinite or NaN; the finite ones of a sum together below 2^22 / `terms`.
        terms: how many such tensors will be added up.
    """
    whole = (scores.double() * FIXED).ceil()
    return torch.where(scores.isfinite(), whole, 0.0).to(torch.int64).masked_fill(~scores.isfinite(), _beyond(terms))


def from_fixed_point(sums: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of `terms` scores in fixed point as `dtype`; infinite where one of them was not finite."""
    return torch.where(sums >= _beyond(terms), float("inf"), sums.double() / FIXED).to(dtype)
