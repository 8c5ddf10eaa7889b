"""A call of one operator in a graph, as an object with the arguments of the operator's schema as its fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch.fx import Graph, Node
from typing_extensions import Self

from zipvl_compile.passes.graph.graph import calls, insert_call, is_call
from zipvl_compile.passes.graph.private import OpOverload


@dataclass(frozen=True, kw_only=True)
class OpCall:
    """A call of one operator, in a graph where `node` is given."""

    operator: ClassVar[OpOverload]
    node: Node | None = field(default=None, compare=False)

    @classmethod
    def matches(cls, node: Any) -> bool:
        """Return whether a node calls this operator."""
        return is_call(node, cls.operator)

    @classmethod
    def all(cls, graph: Graph) -> list[Self]:
        """Return the calls of a graph, in order."""
        return [cls.read(node) for node in calls(graph, cls.operator)]

    @classmethod
    def read(cls, node: Any) -> Self:
        """Return the call that a node makes.

        Raises:
            TypeError: the node calls something else.
        """
        if not cls.matches(node):
            raise TypeError(f"node: expected a call of {cls.operator}, got {getattr(node, 'target', node)}.")
        return cls(node=node, **dict(zip(cls.names(), node.args, strict=False)), **node.kwargs)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the operator's arguments, in order."""
        return [one.name for one in fields(cls) if one.name != "node"]

    def insert(self, before: Node) -> Node:
        """Insert the call before a node."""
        return insert_call(before, self.operator, self._arguments(), self._choice())

    def write(self) -> None:
        """Give the node these arguments; its fake value stays."""
        assert self.node is not None
        self.node.args, self.node.kwargs = self._arguments(), {**self._choice()}

    def _arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.names() if name != "kernel_")

    def _choice(self) -> dict[str, str]:
        """Return the implementation as a keyword, where `choose_kernels` has written one."""
        kernel = getattr(self, "kernel_", "auto")
        return {} if kernel == "auto" else {"kernel_": kernel}
