"""The paper's selection; every token attends to the kept tokens, to its newest keys and to the first ones.

    o[i] = softmax over { j kept : j <= i } and { j : i - 64 < j <= i } and the 4 first tokens

As `window`, but no token loses sight of what the layer finds important. A row costs p + 64 + 4, so that prefill is
n p instead of p^2: at equal work it keeps fewer tokens, which is a smaller KV cache.

A probe row counts as much as it sees of the prompt. A row that sees few tokens gives each of them much, so that the
paper's average favours early tokens, and of a picture with even attention the lower rows are lost.

Source: the local part is that of StreamingLLM (arXiv 2309.17453).
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(score="even", unselected="all", kept_window=True, floor=0.25)
