"""ZipVL as published: fewest tokens that reach tau of the attention, the rest gets no attention output.

    p = fewest tokens whose accumulated scores reach tau = 97.5% of it;  kept: the p best by accumulated / visible
    attention among the kept tokens; a row of zeros for each of the others

64 newest and 64 random rows measure attention. On real models the rows of zeros cost more than everything else that is
dropped; `window` and `hold` give those tokens something.

Source: ZipVL (arXiv 2410.08584), layer-wise adaptive ratio, probe tokens, sparse attention on important tokens.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy()
