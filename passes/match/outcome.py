"""What became of each attention, of the projections around it and of the last hidden state, for passes and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import Node

from zipvl_compile.passes.match.attention_site import AttentionShape
from zipvl_compile.passes.match.reasons import Reason

Kind = Literal["prefill", "decode", "other"]


@dataclass(frozen=True)
class SiteOutcome:
    """One attention site.

    Attributes:
        layer: path of the module that holds it.
        kind: "prefill" or "decode" of a KV cache; "other" is attention without one.
        reason: why it stays dense; None where it was rewritten.
        mask: what the mask of a prefill computes, such as "causal + padding"; empty where nobody asked.
        shape: what the cost of a prefill depends on; None where nobody asked.
        note: what was not done to it, though it was rewritten.
    """

    layer: str
    kind: Kind
    reason: Reason | None = None
    mask: str = field(default="", compare=False)
    shape: AttentionShape | None = field(default=None, compare=False)
    note: Reason | None = None

    @property
    def rewritten(self) -> bool:
        return self.reason is None

    @property
    def by_design(self) -> bool:
        """Return whether staying dense is what should happen, as for a vision tower; nobody needs a warning."""
        return self.reason is not None and self.reason.by_design


PARTS = ("q", "v", "output")


@dataclass(frozen=True)
class Pruning:
    """The projections around one rewritten prefill attention.

    Attributes:
        layer: path of the module that holds the attention.
        reasons: why a projection is computed for every token, by its name in `PARTS`; the others are pruned.
        skipped: why tokens that are not kept do not pass the layer; empty where they do, None where nobody asked.
        keys: why K is computed for every token; empty where it is not, None where the layer's scores read all.
    """

    layer: str
    reasons: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None
    keys: str | None = None

    @property
    def for_every_token(self) -> dict[str, str]:
        """Return what is computed for every token though it might not be, each with the reason."""
        return self.reasons | {part: reason for part, reason in self._also.items() if reason}

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the projections that are computed only for the tokens that need them."""
        return tuple(part for part in PARTS if part not in self.reasons)

    def __str__(self) -> str:
        dense = "".join(f"; {part} for every token: {reason}" for part, reason in self.for_every_token.items())
        return f"{self.layer} pruned: {self.done or 'nothing'}{dense}"

    @property
    def done(self) -> str:
        """Return what is computed for the tokens only that need it, as "q, v, output" or "q, v, output, k, layer"."""
        return ", ".join([*self.parts, *(part for part, reason in self._also.items() if reason == "")])

    @property
    def _also(self) -> dict[str, str | None]:
        """Return what is not asked of every attention, with the reason, as in `skipped` and `keys`."""
        return {"k": self.keys, "layer": self.skipped}


@dataclass(frozen=True)
class Demand:
    """Rows of the last hidden state that are used, such as `slice(-1, None, None)`.

    Attributes:
        reason: why the others are computed all the same; empty where they are not.
    """

    rows: str
    reason: str = ""

    def __str__(self) -> str:
        return f"last hidden state, rows {self.rows}: {self.reason or 'only those are computed'}"


@dataclass(frozen=True)
class Demanded:
    """Rows of the hidden states that are read after the last layer of a graph: they are kept and attend in every layer.

    Attributes:
        newest: how many of the newest are among them, at least 1 (tokens); a node where only the running graph knows.
        others: nodes that hold positions of further ones, int64 `[m]`.
        every: why every row counts as read; empty where only those do.
        text: which rows those are, as the graph writes it, besides the newest one.
        returned: the hidden state, where the graph returns it and those who get it read the newest row alone.
    """

    newest: Any = 1
    others: tuple[Node, ...] = ()
    every: str = ""
    text: tuple[str, ...] = ()
    returned: Node | None = None

    def __str__(self) -> str:
        if self.every:
            return f"every query attends: {self.every}"
        return f"kept, and attending in every layer: rows {', '.join(self.text)}" if self.text else ""
