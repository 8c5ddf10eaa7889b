"""Half of the tokens are dropped after the second layer, for all layers that follow.

    layers 1 and 2 keep every token;  the third keeps those that its newest row attends to most, and the rest reuse them

A dropped token has no attention output and is read by nobody from there on, which comes to dropping its hidden state.

Source: FastV (arXiv 2403.06764), K = 2, R = 50%; it measures attention in the second layer, one layer earlier.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(score="accumulated", dense_layers=2, score_every=0, keep_ratio=0.5, recent_probes=1, random_probes=0)
