"""Where queries and keys come from: one sequence (self-attention) or two (cross-attention).

Shapes cannot tell when both sequences happen to have one length. The projections can: queries and keys of
self-attention are linear maps of the same hidden states,

    q = rope(linear(h, Wq)),   k = rope(linear(h, Wk))                          the same h
    q = linear(norm(linear(h, Wqa)), Wqb),   k = linear(norm(linear(h, Wka)), Wkb)   low-rank (MLA): h two maps up
    q = linear(h, Wq),   k = linear(encoder_output, Wk)                         cross-attention
"""

from __future__ import annotations

from torch.fx import Node

from zipvl_compile.passes.graph.reading import arguments, is_op
from zipvl_compile.passes.match.attention_site import Attention


def is_cross_attention(site: Attention) -> bool:
    """Return whether queries and keys are known to be projected from different hidden states.

    A graph that does not show the projections of both, as after a graph break or with quantised weights, does not
    tell; then this is False.
    """
    queries, keys = _projected(site.query), _projected(site.key)
    if not queries or not keys:
        return False
    return not (queries | _above(queries)) & (keys | _above(keys))


def _above(nodes: set[Node]) -> set[Node]:
    """Return what the given inputs of projections are projected from, as low-rank projections are."""
    return {source for node in nodes for source in _projected(node)}


def _projected(node: Node) -> set[Node]:
    """Return the inputs of the nearest linear maps above `node`."""
    found: set[Node] = set()
    seen: set[Node] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_op(node, "linear"):
            found.add(arguments(node)["input"])
        else:
            todo.extend(node.all_input_nodes)
    return found
