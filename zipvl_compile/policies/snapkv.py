"""What the newest rows look at, smoothed; eviction after a dense prefill.

    kept: the 64 newest tokens, and those that these rows attend to most, scores averaged over 5 neighbours

Here a layer selects once for all heads unless `groups="kv_head"` is asked for, as the paper does.

Source: SnapKV (arXiv 2404.14469), observation window and pooling.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(
    score="accumulated", pooling=5, keep_recent=64, keep_ratio=0.4, prefill="dense", recent_probes=64, random_probes=0
)
