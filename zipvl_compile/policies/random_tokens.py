"""Tokens drawn at random: what any rule must beat.

    kept: ceil(keep_ratio n) tokens in a drawn order that is the same in every layer, and the newest token

One probe row is measured, since it tells padding from tokens; its attention is not used.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(score="random", keep_ratio=0.4, recent_probes=1, random_probes=0)
