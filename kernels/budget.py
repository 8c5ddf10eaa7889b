"""How many tokens a layer keeps, as numbers: p of the paper, and rules beside it.

    p = fewest tokens whose largest scores add up to tau of the total     tau
    p = ceil(keep_ratio * n)                                              keep_ratio
    p = keep_tokens                                                       keep_tokens
    p = min(n, max(p, ceil(floor * n), 1))                                always; n counts padding, too

The floor keeps a layer whose attention is peaked from keeping next to nothing: tau alone leaves 5 tokens to one layer
and 93 to the others.

A graph that was compiled for one budget serves others: they come as a tensor on the CPU, which nobody waits for.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import Any

import torch

from zipvl_compile.kernels.common.checks import fail


def portion(n: Any, fraction: float) -> Any:
    """Return `ceil(fraction * n)` for an `n` that may be symbolic (tokens)."""
    exact = Fraction(fraction).limit_denominator(1_000_000)  # integer arithmetic: symbolic sizes have no ceil
    return (n * exact.numerator + exact.denominator - 1) // exact.denominator


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep.

    Attributes:
        tau: fraction of the accumulated score to keep, in (0, 1]; 1 keeps every token.
        keep_ratio: fixed fraction of the tokens instead, in (0, 1].
        keep_tokens: fixed number instead (tokens), at least 1.
        floor: least fraction of the tokens to keep, in [0, 1].

    Source: ZipVL (arXiv 2410.08584) for tau.
    """

    tau: float = 0.975
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    floor: float = 0.0

    @property
    def fixed(self) -> bool:
        """Return whether the number of tokens does not depend on their scores."""
        return self.keep_ratio is not None or self.keep_tokens is not None or self.tau >= 1

    def least(self, n: Any) -> Any:
        """Return p without regard to the scores: all of it where it is `fixed`, else the floor (tokens)."""
        if self.keep_tokens is not None:
            count = self.keep_tokens
        elif self.keep_ratio is not None:
            count = portion(n, self.keep_ratio)
        else:
            count = n if self.tau >= 1 else 1
        count = torch.sym_max(count, 1)
        return torch.sym_max(count, portion(n, self.floor)) if self.floor > 0 else count

    def as_tensor(self) -> torch.Tensor:
        """Return the numbers as float64 `[4]`, NaN for None."""
        return torch.tensor([math.nan if x is None else x for x in astuple(self)], dtype=torch.float64)

    @classmethod
    def read(cls, numbers: torch.Tensor) -> Budget:
        """Return what `as_tensor` made."""
        tau, keep_ratio, keep_tokens, floor = (None if math.isnan(x) else x for x in numbers.tolist())
        return cls(tau or 1.0, keep_ratio, None if keep_tokens is None else int(keep_tokens), floor or 0.0)

    def check(self, operator: str) -> None:
        """Check the numbers.

        Raises:
            ValueError: a fraction or a count outside its range.
        """
        for name, value in (("tau", self.tau), ("keep_ratio", self.keep_ratio)):
            if value is not None and not 0 < value <= 1:
                fail(operator, name, "a fraction in (0, 1]", value, "Use 1.0 to keep every token.")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            fail(operator, "keep_tokens", "at least 1 token", self.keep_tokens, "The newest token must be kept.")
        if not 0 <= self.floor <= 1:
            fail(operator, "floor", "a fraction in [0, 1]", self.floor, "Use 0 for no floor.")
