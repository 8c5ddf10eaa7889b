"""What each layer should do, from what it costs and saves alone, and what the choices cost together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zipvl_compile.passes.policy import Skip


@dataclass(frozen=True)
class Choice:
    """What is measured where one layer alone selects.

    Attributes:
        layer: its number.
        skip: what its other tokens do without, "attention" or the "layer".
        cost: KL to dense (nats).
        flops, tokens: what it saves, as a share of the FLOPs of a prefill in which every layer scores and keeps every
            token, and of the cached tokens of all layers.
        chosen: whether the options have it.
    """

    layer: int
    skip: Skip
    cost: float
    flops: float
    tokens: float
    chosen: bool = False

    @property
    def worth(self) -> float:
        """Return what it saves of both: a layer is worth its time and its memory."""
        return self.flops + self.tokens


@dataclass(frozen=True)
class Found:
    """What is measured of some layers together: KL (nats), share of the prompt that is kept, FLOPs of a prefill."""

    cost: float
    kept: float
    flops: int


def best(choices: Sequence[Choice], target: float) -> dict[int, Choice]:
    """Return what each layer should do, that which is worth the most first for what it costs, by its number.

    Args:
        choices: at most one of each layer is taken.
        target: most that their costs may add up to (nats).
    """
    taken: dict[int, Choice] = {}
    none = Choice(-1, "attention", 0.0, 0.0, 0.0)
    while True:
        steps = []
        for one in choices:
            before = taken.get(one.layer, none)
            more = max(one.cost, 0.0) - max(before.cost, 0.0)
            if one.worth > before.worth and sum(max(x.cost, 0.0) for x in taken.values()) + more <= target:
                steps.append(((one.worth - before.worth) / more if more > 0 else math.inf, one.worth, one))
        if not steps:
            return taken
        step = max(steps, key=lambda step: step[:2])[2]
        taken[step.layer] = step


def best_together(
    choices: Sequence[Choice], target: float, measure: Callable[[Mapping[int, Choice]], Found]
) -> tuple[dict[int, Choice], Found]:
    """Return the best choices that stay within a target together, and what was measured of them.

    Costs add up to more than their sum, so that less is aimed at until what is measured fits.

    Args:
        choices, target: see `best`.
        measure: of the choices that are taken.
    """
    left, within = [*choices], target
    while True:
        taken = best(left, within)
        found = measure(taken)
        if found.cost <= target or not taken:
            return taken, found
        alone = sum(max(one.cost, 0.0) for one in taken.values())
        if alone > 0:
            within = min(within, alone) * min(0.9, target / found.cost)
        else:  # each costs nothing alone
            left.remove(min(taken.values(), key=lambda one: one.worth))
