"""Sums over ranks as values: tensor parallelism writes them into the parts that were summed.

    y = linear(x, w.to_local())                          y = linear(x, w.to_local())
    y.copy_(wait_tensor(all_reduce(y, "sum", group)))    z = wait_tensor(all_reduce(y, "sum", group))
    h = residual + y                                     h = residual + z

Such a sum treats each row by itself, so that the passes after this one narrow it to the rows that are needed, on all
ranks alike.  Only where nobody can tell: `y` is a new tensor that no other shares memory with.
"""

from __future__ import annotations

from torch.fx import Graph

from zipvl_compile.passes.graph import out_of_place
from zipvl_compile.passes.graph.collectives import summed_over
from zipvl_compile.passes.graph.graph import replace
from zipvl_compile.passes.graph.reading import arguments, example, is_op, same_shape
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Let those that read a part after a sum was written into it read the sum."""
    for node in list(graph.nodes):
        if not is_op(node, "copy_"):
            continue
        given = arguments(node)
        part, whole = given["input"], given["src"]
        if not is_op(whole, "wait_tensor") or summed_over(whole.args[0]) is None or not out_of_place.is_own(node):
            continue
        old, new = example(part), example(whole)
        if whole.args[0].args[0] is not part or old.dtype != new.dtype or not same_shape(old.shape, new.shape):
            continue
        for user in [user for user in part.users if user > node]:
            user.replace_input_with(part, whole)
        replace(node, whole)
        graph.erase_node(node)
