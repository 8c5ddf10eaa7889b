"""What every compile did to every attention site, and the warnings about what stayed dense."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Graph

from zipvl_compile.passes.match import sdpa as normalize_attention
from zipvl_compile.passes.match.outcome import Demand, PassReport, Pruning, SiteOutcome

log = logging.getLogger("zipvl_compile")
_MAX_REPORTS = 256
_recent: deque[CompileReport] = deque(maxlen=_MAX_REPORTS)
_listeners: list[list[CompileReport]] = []
_warned: set[str] = set()


@dataclass
class CompileReport:
    """Every attention site of one compiled graph, and what is computed around those that were rewritten."""

    sites: list[SiteOutcome] = field(default_factory=list)
    pruned: list[Pruning] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)

    @property
    def rewritten(self) -> list[SiteOutcome]:
        return [site for site in self.sites if site.rewritten]

    @property
    def dense(self) -> list[SiteOutcome]:
        return [site for site in self.sites if not site.rewritten]

    def __str__(self) -> str:
        lines = [f"zipvl: {len(self.rewritten)} attention sites rewritten, {len(self.dense)} dense"]
        lines += [f"  {site.layer} {site.kind}: {site.reason or 'rewritten'}" for site in self.sites]
        lines += [f"  {pruning}" for pruning in self.pruned] + [f"  {demand}" for demand in self.demands]
        return "\n".join(lines)


def record(passes: list[PassReport], graph: Graph, training: bool = False) -> CompileReport:
    """Keep the report of one compile, log it, and warn once per reason about decoder attention that stays dense."""
    sites = [site for report in passes for site in report.sites]
    if training:
        reason = "gradients are needed: call model.eval(), or run under torch.no_grad()"
        sites = [SiteOutcome(site.name, "other", reason) for site in normalize_attention.find(graph)]
    pruned = [pruning for report in passes for pruning in report.pruned]
    report = CompileReport(sites, pruned, [demand for report in passes for demand in report.demands])
    if sites:
        _recent.append(report)
    for collected in _listeners:
        collected.append(report)
    log.info("%s", report)
    for site in report.dense:
        if not site.by_design and site.reason not in _warned:
            _warned.add(site.reason)
            warnings.warn(f"zipvl leaves {site.layer} dense ({site.kind}): {site.reason}", UserWarning, stacklevel=2)
    return report


def recent_reports() -> list[CompileReport]:
    """Return the reports of the latest compiles of this process, oldest first."""
    return list(_recent)


@contextlib.contextmanager
def collect() -> Iterator[list[CompileReport]]:
    """Collect the reports of every compile inside the `with` block."""
    collected: list[CompileReport] = []
    _listeners.append(collected)
    try:
        yield collected
    finally:
        _listeners.remove(collected)
