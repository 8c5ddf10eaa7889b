"""Tokens that gathered most attention over all rows; eviction after a dense prefill.

    kept: the largest sums of attention over every row of the prompt, not normalised, and the 16 newest tokens

Sums favour early tokens, which more rows can see. All rows as probes cost as much as dense attention.

Source: H2O (arXiv 2306.14048), heavy hitters.
"""

from zipvl_compile.passes.policy import EVERY_ROW, Policy

POLICY = Policy(
    score="accumulated", keep_recent=16, keep_ratio=0.4, prefill="dense", recent_probes=EVERY_ROW, random_probes=0
)
