"""Which inputs of a node have the tokens of its output, by the rules of `axis_rules.py`.

A weight that is a tensor subclass computes whatever its library wrote: int8 weights multiply, dynamic int8 scales by
each token, or by all of them at once. Such a linear is traced (`opaque_weight.py`), and is row-wise where every
operation inside is:

    linear(x [B, n, K], w)      x.abs().amax(-1, keepdim=True) ...      each row by itself
                                x.abs().amax() ...                      mixes tokens
"""

from __future__ import annotations

from torch.fx import Node

from zipvl_compile.passes.graph.op_kinds import Tokens
from zipvl_compile.passes.graph.reading import arguments, holds_subclass, is_op, of, spelled, written
from zipvl_compile.passes.tokenwise import opaque_weight
from zipvl_compile.passes.tokenwise.axis_rules import RULES, Carried, Mixes, rank, same_rows


def carried(node: Node, axis: int) -> Carried:
    """Return the inputs of `node` that have the tokens of its output's `axis`, each with their axis.

    Inputs that are left out are the same for every token.

    Raises:
        Mixes: a token of the output may depend on several tokens of an input.
    """
    op = of(node)
    if op is None or op.tokens is None:
        raise Mixes(f"{spelled(node)!r} may mix tokens")
    try:
        given = arguments(node)
        if written(node) and op.tokens is not Tokens.COPY:
            raise Mixes(f"{spelled(node)!r} changes a tensor in place")
        found = RULES[op.tokens](node, axis, given)
        if holds_subclass(node):
            _check_inside(node)
    except Mixes:
        raise
    except Exception as error:  # a form of the call that its rule was not written for
        raise Mixes(f"{spelled(node)!r} is called in an unknown way ({type(error).__name__}: {error})") from error
    return {x: own for x, own in found.items() if isinstance(x, Node)}


def axis_below(node: Node, given: Carried) -> int:
    """Return the axis of `node`'s output that has the tokens of its inputs `given`.

    Raises:
        Mixes: there is none.
    """
    reasons = {}
    for axis in range(rank(node)):
        try:
            inputs = carried(node, axis)
        except Mixes as reason:
            reasons[axis] = reason
            continue
        if all(inputs.get(x) == a for x, a in given.items()):
            return axis
    likely = next((a for a in given.values() if a in reasons), max(reasons, default=0))
    unlike = "meets tokens on different axes" if rank(node) else "may mix tokens"
    raise reasons.get(likely, Mixes(f"{spelled(node)!r} {unlike}"))


def _check_inside(node: Node) -> None:
    """Refuse a linear unless every row `[..., :]` of its result comes from the same row of its input."""
    before = rank(arguments(node)["input"]) - 1
    if opaque_weight.walk(node, before, _leading_axes) != rank(node) - 1:
        raise Mixes(f"{spelled(node)!r} with {opaque_weight.name(node)} takes rows apart")


def _leading_axes(node: Node, given: dict[Node, int]) -> int:
    """Return how many leading axes of a node count its rows; those of its inputs are `given`."""
    if is_op(node, "view", "reshape", "flatten"):
        ((source, count),) = given.items()
        return same_rows(source, count, node)
    count = min(given.values())
    if count != max(given.values()):
        raise Mixes(f"{spelled(node)!r} meets rows that are counted otherwise")
    for axis in range(count):
        inputs = carried(node, axis)
        if any(inputs.get(x) != axis for x in given):
            raise Mixes(f"{spelled(node)!r} may mix tokens")
    return count
