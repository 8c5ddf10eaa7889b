"""The first and the newest tokens stay, whatever they say; eviction after a dense prefill.

    kept: 4 first tokens, and the newest up to the budget

Source: StreamingLLM (arXiv 2309.17453), attention sinks and a window. One probe row tells padding from tokens.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(score="recent", keep_first=4, keep_ratio=0.4, prefill="dense", recent_probes=1, random_probes=0)
