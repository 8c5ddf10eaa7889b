"""The paper's selection; a token that is not kept attends to its newest keys and to the first ones.

    o[i] = softmax over { j : i - 64 < j <= i } and the 4 first tokens

The work of a row is constant, so that prefill stays p^2 + n (window + sinks). Most of what a token looks at is near it,
or is the attention sink at the start. A layer keeps at least a quarter of its tokens: tau alone starves single layers.

Source: the attention pattern is that of StreamingLLM (arXiv 2309.17453), for the tokens that ZipVL does not keep.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(unselected="window", floor=0.25)
