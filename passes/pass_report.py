"""What a pass did to each attention site, or why it left it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["prefill", "decode", "other"]


@dataclass(frozen=True)
class SiteOutcome:
    """One attention site: `layer` path, `kind`, and `reason`, which is empty where it was rewritten."""

    layer: str
    kind: Kind
    reason: str = ""

    @property
    def rewritten(self) -> bool:
        return not self.reason


@dataclass
class PassReport:
    """The outcomes of one pass over one graph, in execution order."""

    name: str
    sites: list[SiteOutcome] = field(default_factory=list)
