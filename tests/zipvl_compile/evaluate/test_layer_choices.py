"""The choice of what layers should do, by hand."""

import pytest
from support.layer_choices import choices

from zipvl_compile.evaluate.layer_choices import Choice, Found, best, best_together


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        (2.0, {0: "layer", 1: "layer", 2: "layer", 3: "layer"}),
        (0.7, {0: "attention", 1: "layer", 2: "attention", 3: "layer"}),
        (0.05, {1: "layer", 3: "attention"}),
        (0.015, {1: "attention"}),
        (0.005, {}),
    ],
)
def test_the_best_choice_by_hand(target, taken):
    found = best(choices(), target)
    assert {n: one.skip for n, one in found.items()} == taken


def test_what_costs_nothing_is_always_taken_and_what_saves_nothing_never():
    free, useless = Choice(0, "attention", -0.01, 0.0, 0.1), Choice(1, "attention", 0.0, -0.1, 0.0)
    assert best([free, useless], 0.0) == {0: free}


def test_layers_that_cost_nothing_alone_and_much_together():
    asked = [Choice(n, "attention", 0.0, 0.01 * n, 0.1) for n in range(4)]
    sizes = []

    def measure(taken):
        sizes.append(len(taken))
        return Found(0.3 * max(len(taken) - 1, 0), 1.0, 100)

    taken, found = best_together(asked, 0.2, measure)
    assert list(taken) == [3] and found.cost == 0.0 and sizes == [4, 3, 2, 1], "the one that is worth the most is left"


@pytest.mark.parametrize("target", [0.7, 0.05, 0.0])
@pytest.mark.parametrize("more", [1.0, 1.3, 50.0])
def test_what_is_measured_together_stays_within_the_target(target, more):
    """However much more choices cost together than the sum of what they cost alone."""

    def measure(taken):
        return Found(more * sum(one.cost for one in taken.values()), 1.0, 100)

    taken, found = best_together(choices(), target, measure)
    assert found.cost <= target and found == measure(taken)
    assert bool(taken) == (0.01 * more <= target)
