"""An attention among kept tokens, read back from the graph, with the selection that chose them."""

from __future__ import annotations

from torch.fx import Node

from zipvl_compile.passes.graph.op_calls import (
    DecodeAttentionCall,
    SelectTokensCall,
    SparseAttentionCall,
    TokenScoresCall,
    WindowAttentionCall,
)
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.row_select import one_sample

KINDS = (SparseAttentionCall, DecodeAttentionCall, WindowAttentionCall)


class Around:
    """An attention among the kept tokens, as it stands in the graph, with the selection that chose them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.whole = SparseAttentionCall.matches(node)  # else it has the newest queries only
        self.call = next(kind for kind in KINDS if kind.matches(node)).read(node)
        self.positions: Node = self.call.positions
        self.query: Node = self.call.q
        self.selection = SelectTokensCall.read(self.positions)

    @property
    def scores(self) -> TokenScoresCall:
        """Return the scores that chose the tokens, as they stand."""
        return self.selection.scores

    @property
    def scores_node(self) -> Node:
        assert self.scores.node is not None
        return self.scores.node

    @property
    def keys(self) -> Node:
        return self.call.keys if isinstance(self.call, DecodeAttentionCall) else self.call.k

    @property
    def values(self) -> Node:
        return self.call.values if isinstance(self.call, DecodeAttentionCall) else self.call.v

    @property
    def all_attend(self) -> bool:
        return isinstance(self.call, SparseAttentionCall) and self.call.queries == "all"

    @property
    def axes(self) -> Axes:
        """Return those of `[B, H, n, D]`."""
        return Axes(2, None if one_sample(self.query) else 0)
