"""Which ranks share the heads of an attention under tensor parallelism, as the graph says.

    q   = linear(x, wq.to_local())                             the heads of this rank
    y   = linear(sdpa(q, k, v), wo.to_local())                 their part of the output
    y.copy_(wait_tensor(all_reduce(y, "sum", group)))

A rank sees the attention of its own heads only. All ranks of the group must keep the same tokens, those that one
process with all heads would keep, so the scores of tokens are summed over the group before tokens are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import Node

from zipvl_compile.passes.graph import collectives
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.policy import Policy
from zipvl_compile.passes.tokenwise.backward_slice import multiplies

HOW = 'load the model with tp_plan="auto" and run it under torch.no_grad()'


class Unknown(Exception):
    """Several ranks share the heads of an attention, and it is not known which."""


UNKNOWN = Reason(
    Why.RANKS,
    "the model is shared by several ranks, and no sum over the ranks that have its heads was found after its output "
    f"projection: {HOW}",
)
EACH_HEAD = Reason(Why.RANKS, 'groups="kv_head" where several ranks share its heads: each would keep another number')
VALUES = Reason(Why.RANKS, 'score="value" where several ranks share its heads: each would see the values of its own')


def group_of(query: Node, attention: Node) -> str | None:
    """Return the process group whose ranks share the heads of an attention; None where one rank has them all.

    Args:
        query: of the attention, `[B, Hq, m, D]`.
        attention: its output.

    Raises:
        Unknown: several ranks do, and it is not known which.
    """
    if not collectives.are_several():
        return None
    above = _nearest(query, lambda x: x.all_input_nodes)
    below = _nearest(attention, lambda x: x.users)
    sums = [{name for user in node.users if (name := collectives.summed_over(user)) is not None} for node in below]
    try:
        owners = set().union(*map(_owners, above))
        names = owners.union(*sums, *map(_owners, below))
        elsewhere = collectives.in_use(attention.graph)
    except collectives.Uneven as error:
        raise Unknown from error
    between = any(map(collectives.communicates, (*above, *below)))
    if not names and not between and not collectives.is_spread(example(query)):
        # Of a graph that sums over ranks elsewhere, as where only MLPs are shared, nobody knows that ranks compute the
        # same scores to the last bit; and a graph without projections does not say whose heads it is given.
        if elsewhere or not (above and below):
            raise Unknown
        return None
    # One projection, whose sum is over the ranks that have the weights above it and its own. Ranks of another group
    # keep other tokens, and a sum over both, of rows that were narrowed, would add up different ones.
    everywhere = {name for node in attention.graph.nodes if (name := collectives.summed_over(node)) is not None}
    if between or len(names) != 1 or not owners or sums != [names] or everywhere != names:
        raise Unknown
    return names.pop()


def shared_by(query: Node, attention: Node, policy: Policy) -> tuple[str | None, Reason | None]:
    """Return the process group whose ranks share the heads of an attention, and why it must stay dense for that.

    One of the two at most; both are None where one rank has all heads.
    """
    try:
        group = group_of(query, attention)
    except Unknown:
        return None, UNKNOWN
    if group is not None and policy.groups == "kv_head":
        return None, EACH_HEAD
    return (None, VALUES) if group is not None and policy.score == "value" else (group, None)


def _nearest(start: Node, following: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """Return the nearest projections and calls between ranks in one direction."""
    found, seen, todo = [], {start}, [start]
    while todo:
        for node in following(todo.pop()):
            if node in seen:
                continue
            seen.add(node)
            if multiplies(node) or collectives.communicates(node):
                found.append(node)
            else:
                todo.append(node)
    return found


def _owners(projection: Node) -> set[str]:
    """Return the process groups over whose ranks a projection's weights are spread."""
    found: set[str] = set()
    for x in projection.all_input_nodes:
        for one in (x, *(x.all_input_nodes if x.op == "call_method" and x.target == "to_local" else ())):
            found |= collectives.groups(example(one))
    return found
