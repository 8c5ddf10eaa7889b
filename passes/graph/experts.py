"""The experts of a mixture as one call, while the passes move rows about.

    routed_experts(hidden [n, C], ids [n, K], weights [n, K], gate_up [E, ..], down [E, ..])    ->    [n, K, C]

It holds the operations that a model's own code traced to, for any n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule


class RoutedExperts:
    """A call that treats each row of its first tensors by itself.

    Attributes:
        graph: the operations. Its inputs are the call's, with n and n K after the first `tokens`.
        tokens: how many tensors come first that have a row for each token.
        experts: K, of how many each token takes.
    """

    __name__ = "routed_experts"  # as a function, which graphs call their targets by

    def __init__(self, graph: Graph, tokens: int, experts: int) -> None:
        self.graph, self.tokens, self.experts = graph, tokens, experts
        self._module: GraphModule | None = None

    def __call__(self, *args: Any) -> torch.Tensor:
        """Run the operations, on real tensors or fake ones."""
        if self._module is None:
            self._module = GraphModule(torch.nn.Module(), self.graph)
        n = args[0].shape[0]
        return self._module(*args[: self.tokens], n, n * self.experts, *args[self.tokens :])
