"""What a pass did to each attention site, or why it left it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["prefill", "decode", "other"]


@dataclass(frozen=True)
class SiteOutcome:
    """One attention site.

    Attributes:
        layer: path of the module that holds it.
        kind: "prefill" or "decode" of a KV cache; "other" is attention without one.
        reason: why it stays dense; empty where it was rewritten.
        by_design: staying dense is what should happen, as for a vision tower; nobody needs a warning.
        mask: what the mask of a prefill computes, such as "causal + padding"; empty where nobody asked.
    """

    layer: str
    kind: Kind
    reason: str = ""
    by_design: bool = False
    mask: str = field(default="", compare=False)

    @property
    def rewritten(self) -> bool:
        return not self.reason


PARTS = ("q", "v", "output")


@dataclass(frozen=True)
class Pruning:
    """The projections around one rewritten prefill attention.

    Attributes:
        layer: path of the module that holds the attention.
        reasons: why a projection is computed for every token, by its name in `PARTS`; the others are pruned.
    """

    layer: str
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the projections that are computed only for the tokens that need them."""
        return tuple(part for part in PARTS if part not in self.reasons)


@dataclass
class PassReport:
    """The outcomes of one pass over one graph, in execution order; `pruned` are the projections beside them."""

    name: str
    sites: list[SiteOutcome] = field(default_factory=list)
    pruned: list[Pruning] = field(default_factory=list)
