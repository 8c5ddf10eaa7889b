"""Policy: what follows from its fields."""

import pytest

from zipvl_compile.kernels.budget import Budget
from zipvl_compile.kernels.probe_rows import STRIDED
from zipvl_compile.passes.policy import Policy


@pytest.mark.parametrize(
    ("fields", "keeps_all"),
    [
        ({}, False), ({"tau": 1.0}, True), ({"keep_ratio": 1.0}, True), ({"floor": 1.0}, True),
        ({"tau": 1.0, "keep_ratio": 0.5}, False), ({"tau": 1.0, "keep_tokens": 5}, False), ({"floor": 0.9}, False),
    ],
)  # fmt: skip
def test_whether_every_token_is_kept(fields, keeps_all):
    assert Policy(**fields).keeps_all is keeps_all


def test_what_the_operators_take():
    assert Policy(tau=0.5, floor=0.2).budget == Budget(0.5, None, None, 0.2)
    assert (Policy(seed=7).probe_seed, Policy(seed=7, draw="strided").probe_seed) == (7, STRIDED)
    assert [Policy(unselected=kind).queries for kind in ("zero", "hold", "all")] == ["selected", "selected", "all"]
    assert Policy(recent_probes=3, random_probes=4).probes == 7
