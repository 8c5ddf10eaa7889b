"""What tokens rank by, where it is not what `select_tokens` computes from the scores itself.

    accumulated   a                                    value    a / nnz * |v|, mean over the KV heads of a group
    recent        1 + j                                random   1 + a drawn order of the positions
    pooling       the mean of `pooling` neighbours

All are `[B, G, n]`, not negative, and 0 for tokens that no probe row may see, so that padding comes last.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from zipvl_compile.kernels.probe_rows import shuffled_order
from zipvl_compile.passes.graph.graph import insert_call
from zipvl_compile.passes.graph.op_calls import TokenPositionsCall
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.policy import Policy


def insert(accumulated: Node, visible: Node, key: Node, value: Node, policy: Policy, before: Node) -> Node | None:
    """Insert what tokens rank by before a node; return it, or None where that is `accumulated / visible`.

    Args:
        accumulated, visible: `[B, G, n]` and `[B, n]`, as token_scores returned them.
        key, value: `[B, Hkv, n, D]` and `[B, Hkv, n, Dv]`.
    """
    if policy.score in ("normalised", "even") and policy.pooling == 1:
        return None

    def call(target, *args, **kwargs) -> Node:
        return insert_call(before, target, args, kwargs)

    shown = call(torch.unsqueeze, visible, 1)  # [B, 1, n]
    ranking = accumulated
    if policy.score in ("normalised", "even", "value"):
        ranking = call(torch.div, accumulated, call(torch.clamp, shown, min=1))
    if policy.score == "value":
        groups = example(accumulated).shape[1]
        norms = call(torch.linalg.vector_norm, value, dim=-1, dtype=example(accumulated).dtype)  # [B, Hkv, n]
        norms = call(torch.unflatten, norms, 1, (groups, -1))
        ranking = call(torch.mul, ranking, call(torch.mean, norms, 2))
    if policy.score in ("recent", "random"):
        at = TokenPositionsCall(k=key).insert(before)  # [B, 1, n]
        if policy.score == "random":
            at = call(shuffled_order, at, policy.seed)
        ranking = call(torch.mul, call(operator.add, at, 1), call(operator.gt, shown, 0))
        ranking = call(torch.add, call(torch.zeros_like, accumulated), ranking)
    if policy.pooling > 1:
        ranking = call(F.avg_pool1d, ranking, policy.pooling, 1, policy.pooling // 2)
        ranking = call(torch.mul, ranking, call(operator.gt, shown, 0))
    return ranking
