"""What every compile did to every attention site, and the warnings about what stayed dense."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch.fx import Graph

from zipvl_compile.attention_switch import READ
from zipvl_compile.callers import attention_switch
from zipvl_compile.passes.cost_model import NEVER
from zipvl_compile.passes.match.left_dense import BROKEN, SDPA_HELPS
from zipvl_compile.passes.match.outcome import Demand, Pruning, SiteOutcome
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import read_all
from zipvl_compile.passes.tokenwise.zero_rows import LEAVES_THE_GRAPH
from zipvl_compile.pipeline import Rewritten

log = logging.getLogger("zipvl_compile")
GRADIENTS = Reason(
    Why.GRADIENTS,
    "gradients are on, and an input or a parameter in training mode requires them: run under torch.no_grad(), or "
    "detach the inputs and call model.eval()",
)
_MAX_REPORTS = 256
_recent: deque[CompileReport] = deque(maxlen=_MAX_REPORTS)
_listeners: list[list[CompileReport]] = []
_warned: set[str] = set()


@dataclass
class CompileReport:
    """Every attention site of one compiled graph, and what is computed around those that were rewritten.

    Attributes:
        sites: in the order of the graph, those of a prefill first, then those of decoding, then the others.
        pruned: projections around the attentions that were made sparse.
        demands: rows of the last hidden state that are used.
        demanded: which rows are kept and attend because they are read, or why every query attends; empty where nothing
            was made sparse, or where the newest row alone is read.
        seconds: taken by the matching and by each pass.
        faults: passes that failed and were left out, with their errors.
    """

    sites: list[SiteOutcome] = field(default_factory=list)
    pruned: list[Pruning] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    demanded: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def rewritten(self) -> list[SiteOutcome]:
        return [site for site in self.sites if site.rewritten]

    @property
    def dense(self) -> list[SiteOutcome]:
        return [site for site in self.sites if not site.rewritten]

    def __str__(self) -> str:
        lines = [f"zipvl: {len(self.rewritten)} attention sites rewritten, {len(self.dense)} dense"]
        lines += [f"  {site.layer} {site.kind}: {site.reason or 'rewritten'}{_said(site)}" for site in self.sites]
        lines += [f"  {pruning}" for pruning in self.pruned] + [f"  {demand}" for demand in self.demands]
        lines += [f"  {self.demanded}"] if self.demanded else []
        lines += [f"  pass {name} failed: {error}" for name, error in self.faults.items()]
        return "\n".join(lines)


def _said(site: SiteOutcome) -> str:
    return "" if site.note is None else f" ({site.note})"


def record(done: Rewritten) -> CompileReport:
    """Keep the report of one compile, log it, and warn once per reason about decoder attention that stays dense."""
    sites = done.sites
    demanded = str(sites.demanded) if any(site.rewritten for site in sites.prefill) else ""
    outcomes = [_with_remedy(site, attention_switch()) for site in sites.outcomes]
    return _keep(CompileReport(outcomes, sites.pruned, sites.demands, demanded, done.seconds, done.faults))


def _with_remedy(site: SiteOutcome, switch: str | None) -> SiteOutcome:
    """Say of a graph break before an attention where it may come from the attention itself, as in flash functions."""
    if site.reason is not BROKEN or switch in (None, *READ):
        return site
    text = f"{BROKEN}, as attn_implementation={switch!r} may make one: {SDPA_HELPS}"
    return replace(site, reason=replace(BROKEN, text=text))


def record_training(graph: Graph) -> CompileReport:
    """Report that a graph stays as it is because it will be differentiated."""
    attentions, _ = read_all(graph)
    return _keep(CompileReport([SiteOutcome(one.name, "other", GRADIENTS) for one in attentions]))


def _keep(report: CompileReport) -> CompileReport:
    if report.sites:
        _recent.append(report)
    for collected in _listeners:
        collected.append(report)
    log.info("%s", report)
    log.debug("zipvl: seconds by pass: %s", report.seconds)
    for site in report.dense:
        if not site.by_design:
            _warn_once(str(site.reason), f"zipvl leaves {site.layer} dense ({site.kind}): {site.reason}")
    for note in {site.note: None for site in report.sites if site.note is not None}:
        _warn_once(str(note), f"zipvl: {note}.")
    for line in (left_dense(site.reason for site in report.sites), split(report.pruned)):
        if line is not None:
            _warn_once(line, f"zipvl: {line}")
    return report


def _warn_once(fact: str, text: str) -> None:
    if fact not in _warned:
        _warned.add(fact)
        warnings.warn(text, UserWarning, stacklevel=3)


def left_dense(reasons: Iterable[Reason | None]) -> str | None:
    """Return the line about a prompt that gains nothing, and from where one would; None where no layer is so."""
    lengths = [one.min_tokens for one in reasons if one is not None and one.min_tokens is not None]
    if not lengths:
        return None
    if min(lengths) >= NEVER:
        return (
            "this prompt stays dense, and longer ones would, too: keeping so many tokens gains no time at any length."
        )
    return (
        f"this prompt stays dense, as all of fewer than {min(lengths)} tokens do (option min_tokens, by default where "
        "no time would be gained); options={'min_tokens': 0} compacts them all the same."
    )


def split(pruned: Iterable[Pruning]) -> str | None:
    """Return the line about layers whose graphs end between the attention and its projection; None where none does."""
    if not any(LEAVES_THE_GRAPH in reason for one in pruned for reason in one.reasons.values()):
        return None
    return (
        "graphs end between an attention and its projection, which this rule would give rows of zeros, so that prompts "
        "are attended to densely and only the KV cache is compacted. Hooks of accelerate (a device_map over several "
        "devices, offloading) and DoRA adapters do that: take the default rule, load the model onto one device, spread "
        "it with tp_plan='auto', or merge the adapters before compiling."
    )


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
        _listeners[:] = [one for one in _listeners if one is not collected]  # two lists may be equal
