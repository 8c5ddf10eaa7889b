"""What a pattern of attention nearly matches."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.match.attention_site import module_path
from zipvl_compile.passes.match.reasons import Reason, Why

FLEX_ATTENTION = "FlexAttention"  # the pattern of calls that no pattern is made of


@dataclass(frozen=True)
class NearMiss:
    """A node that a pattern nearly matches.

    Attributes:
        node: where the pattern starts: the SDPA or FlexAttention call, or the softmax.
        pattern: name of the nearest pattern.
        difference: the first difference from it.
    """

    node: Node
    pattern: str
    difference: str

    def __str__(self) -> str:
        return f"nearest pattern: {self.pattern}; first difference: {self.difference}"

    @property
    def name(self) -> str:
        return module_path(self.node)

    @property
    def reason(self) -> Reason:
        """Return why it stays as it is."""
        return Reason(Why.FLEX_ATTENTION, str(self))

    @property
    def is_flex(self) -> bool:
        """Return whether it is a FlexAttention call."""
        return self.pattern == FLEX_ATTENTION

    @property
    def listed_alone(self) -> bool:
        """Return whether it is listed where no cache leads to it: a softmax may be anything else."""
        return not is_op(self.node, "softmax")
