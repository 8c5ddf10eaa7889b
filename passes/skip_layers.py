"""Tokens that a layer does not keep pass it on the residual stream, unchanged.

Before (after `sparsify_prefill`):

    h = x + linear(sparse_attention(q, keys, values, positions, ...), wo)       n tokens
    y = h + mlp(norm(h))                                                        n tokens

After, with `skip="layer"`:

    h_p = x[positions] + linear(sparse_attention(q[positions], ...), wo)        P kept tokens
    y = x.index_copy(positions, h_p + mlp(norm(h_p)))

So everything of the layer but its keys and their scores is computed for kept tokens only. Other than the rest of the
pruning this is a rule of its own: the kept tokens get what they would have got, the others get no MLP. What the layer
is, is proven from the graph (`tokenwise/residual_stream.py`); where it cannot be, the layer is computed for every token
and only its attention skips those that are not kept, with the reason.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from zipvl_compile.passes.graph.experts import RoutedExperts
from zipvl_compile.passes.graph.graph import erase_unread
from zipvl_compile.passes.graph.graph import replace as replace_node
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import Cone, multiplies
from zipvl_compile.passes.tokenwise.residual_stream import LayerEnd, find
from zipvl_compile.passes.tokenwise.row_select import OfEachSample, Shared
from zipvl_compile.passes.tokenwise.sole_readers import computed_only_for

ATTENTION_ALONE = "it is known to add nothing but the attention to the residual stream"


def layer_of(attention: Node, axes: Axes) -> tuple[LayerEnd, Cone]:
    """Return where the layer of an attention ends, and what of it is computed for kept tokens only.

    Raises:
        Mixes: it is not known what the layer is, or it is not known to treat each token by itself.
    """
    end = find(attention, axes)
    cone = computed_only_for(end.output, end.axes, set(end.output.users))
    if cone.sources.get(attention) != axes:
        raise Mixes(next(iter(cone.stops.values()), "the tokens are on different axes"))
    if sum(map(multiplies, cone.nodes)) < 2:
        raise Mixes(f"{ATTENTION_ALONE} ({end.stop})" if end.stop else ATTENTION_ALONE)
    return end, cone


def work(attention: Node) -> int:
    """Return how many multiply-adds a token saves that passes the layer of an attention; 0 where it cannot.

    Args:
        attention: its output `[B, H, n, D]`, in a graph that is not rewritten yet.
    """
    try:
        _, cone = layer_of(attention, Axes(2))
    except Mixes:
        return 0
    return sum(_of_a_token(node, cone) for node in cone.nodes if multiplies(node))


def _of_a_token(node: Node, cone: Cone) -> int:
    """Return how many numbers of the weights of a projection a token is multiplied with."""
    weights = [example(x) for x in node.all_input_nodes if x not in cone.nodes]
    taken = node.target.experts if isinstance(node.target, RoutedExperts) else None  # of E, for weights [E, .., ..]
    axes = 2 if taken is None else 3
    fixed = [x for x in weights if isinstance(x, torch.Tensor) and x.dim() == axes and isinstance(x.numel(), int)]
    return sum(x.numel() if taken is None else x[0].numel() * taken for x in fixed)


def rewrite(attention: Node, axes: Axes, out: Node, kept: Shared | OfEachSample) -> None:
    """Compute the rest of a layer for the kept tokens only, and let the others pass.

    Args:
        attention: its output for every token, `[B, H, n, D]`.
        axes: of that.
        out: the same for the kept tokens, `[B, H, P, D]`, in the graph before it.
        kept: the kept tokens.

    Raises:
        Mixes: it is not known what the layer is, or it is not known to treat each token by itself.
    """
    end, cone = layer_of(attention, axes)
    output = end.output
    taken = {x: out if x is attention else kept.take(x, own, output) for x, own in cone.sources.items()}
    rows, base = cone.again(taken, kept.count, output)[output], end.passed(output)
    if example(rows).dtype != example(base).dtype:
        raise Mixes("what passes the layer has another dtype than its output")
    replace_node(output, kept.put(rows, end.axes, base, output))
    cone.erase()
    erase_unread([attention])
