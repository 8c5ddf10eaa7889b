"""Tokens that a layer does not keep pass it unchanged: no attention, no MLP.

    y[kept] = layer(x)[kept];   y[others] = x[others];   the first quarter of the layers keeps every token

Nearly all work of a layer then goes with the number of kept tokens, so that short prompts gain, too.

Source: tokens that pass a layer by what the layer itself keeps are ours; that the first layers must not be passed is
what FastV (arXiv 2403.06764) and ShortV (arXiv 2504.00502) found.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(skip="layer", score="even", dense_layers=0.25)
