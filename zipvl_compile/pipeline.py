"""The passes, in order: one row each, with what it needs of the rows before it and what it gives to those after it.

`rewrite` matches the attention of a graph once and runs the rows. After each it checks the graph (lint). Where a pass
fails, all of it starts anew without that pass, with a warning, since a fault of ours must not break the user's model.
With the environment variable `ZIPVL_DUMP=DIR` it writes the graph before and after each pass as readable Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch.fx import Graph

from zipvl_compile.cache.uneven import check_layers_agree
from zipvl_compile.callers import decoder_layers, newest_rows_read
from zipvl_compile.dynamo import UserError
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes import (
    choose_kernels,
    demand_rows,
    fold_experts,
    fold_sums,
    fuse_gathers,
    keep_every_token,
    keep_true_rows,
    note_queries,
    prune_projections,
    read_compact_cache,
    read_demands,
    reselect_later_parts,
    sparsify_prefill,
    unfold_experts,
    unmask_dense,
)
from zipvl_compile.passes.graph.graph import copied
from zipvl_compile.passes.match.sites import Sites, match
from zipvl_compile.passes.policy import Policy
from zipvl_compile.passes.settings import Settings
from zipvl_compile.report.costs import DENSE_FROM, least_tokens

log = logging.getLogger("zipvl_compile")
_dumps = itertools.count()
MATCH = "match"  # the step before the passes, among their times and faults


@dataclass(frozen=True)
class Row:
    """One pass: its name, what runs it, what it needs of earlier rows, and what it gives to later ones."""

    name: str
    apply: Callable[[Graph, Sites, Settings], None]
    needs: tuple[str, ...]
    gives: str


PIPELINE: tuple[Row, ...] = (
    Row("fold_experts", fold_experts.apply, ("sites",), "experts as single calls"),
    Row("fold_sums", fold_sums.apply, ("sites",), "sums over ranks as values"),
    Row("read_demands", read_demands.apply, ("sites",), "rows that are read"),
    Row("keep_true_rows", keep_true_rows.apply, ("sites", "rows that are read"), "what takes rows of zeros"),
    Row("note_queries", note_queries.apply, ("sites",), "noted queries"),
    Row("sparsify_prefill", sparsify_prefill.apply, ("rows that are read", "what takes rows of zeros"), "selections"),
    Row("read_compact_cache", read_compact_cache.apply, ("sites",), "attention over compacted caches"),
    Row(
        "reselect_later_parts",
        reselect_later_parts.apply,
        ("attention over compacted caches", "noted queries"),
        "later parts",
    ),
    Row("demand_rows", demand_rows.apply, ("selections",), "demanded rows of the last layer"),
    Row("prune_projections", prune_projections.apply, ("selections", "demanded rows of the last layer"), "kept rows"),
    Row("unfold_experts", unfold_experts.apply, ("experts as single calls", "kept rows"), "no calls but of operators"),
    Row("unmask_dense", unmask_dense.apply, ("sites", "demanded rows of the last layer"), "causal dense attention"),
    Row("keep_every_token", keep_every_token.apply, ("selections",), "copies with room"),
    Row("fuse_gathers", fuse_gathers.apply, ("kept rows", "copies with room"), "one gather of K and V"),
    Row("choose_kernels", choose_kernels.apply, ("causal dense attention", "one gather of K and V"), "kernels"),
)


@dataclass
class Rewritten:
    """A rewritten graph.

    Attributes:
        graph: the graph to compile; another object than the given one where a pass failed.
        sites: its attentions, with what became of each.
        seconds: taken by the matching and by each pass that did not fail.
        faults: passes that failed and were left out, with their errors.
    """

    graph: Graph
    sites: Sites
    seconds: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def without(*names: str) -> tuple[Row, ...]:
    """Return the pipeline minus some passes."""
    unknown = set(names) - {row.name for row in PIPELINE}
    if unknown:
        raise ValueError(f"names: expected passes of the pipeline, got {sorted(unknown)}. See PIPELINE.")
    return tuple(row for row in PIPELINE if row.name not in names)


@contextlib.contextmanager
def leaving_out(*names: str) -> Iterator[None]:
    """Leave some passes out of every graph that is compiled inside the block: to measure them, or to find a fault."""
    global PIPELINE
    whole, PIPELINE = PIPELINE, without(*names)
    try:
        yield
    finally:
        PIPELINE = whole


def settings_of(options: ZipVLOptions) -> Settings:
    """Return what the passes need of the options."""
    rule = {field.name: getattr(options, field.name) for field in dataclasses.fields(Policy)}
    return Settings(
        **rule,
        evict=options.evict,
        evict_bits=options.evict_bits,
        min_tokens=least_tokens(options),
        dense_from=1.0 if options.min_tokens is not None else DENSE_FROM,
        reselect_tokens=options.reselect_tokens,
        reselect_every=options.reselect_every,
        kernel=options.kernel,
        newest_rows_read=newest_rows_read,
        decoder_layers=decoder_layers,
        per_request=True,
    )


def rewrite(graph: Graph, settings: Settings, passes: tuple[Row, ...] | None = None) -> Rewritten:
    """Run the passes (`PIPELINE` unless others are given) over a Dynamo graph; what comes back replaces the graph.

    Raises:
        UnevenCacheError: the graph reads a cache that an interrupted forward left uneven.
    """
    original, faults, dump = copied(graph), dict[str, str](), _Dump()
    while True:
        done = Rewritten(graph, Sites(), faults=faults)
        if _run(done, settings, PIPELINE if passes is None else passes, dump):
            return done
        graph = copied(original)


def _run(done: Rewritten, settings: Settings, passes: tuple[Row, ...], dump: _Dump) -> bool:
    """Match and run the passes that have not failed, and check the graph after each; return whether none fails."""
    name, start = MATCH, time.perf_counter()
    try:
        if MATCH not in done.faults:
            done.sites = match(done.graph)
            done.graph.lint()
            done.seconds[MATCH] = time.perf_counter() - start
        check_layers_agree(done.sites)
        for row in passes:
            if row.name in done.faults:
                continue
            name, start = row.name, time.perf_counter()
            dump.write(done.graph, name, "before")
            row.apply(done.graph, done.sites, settings)
            done.graph.lint()
            done.seconds[name] = time.perf_counter() - start
            dump.write(done.graph, name, "after")
    except UserError:
        raise
    except Exception as error:
        done.faults[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        log.warning("zipvl: the pass %s failed and was left out", name, exc_info=True)
        text = f"zipvl: the pass {name} failed and was left out ({done.faults[name]}). Please report this."
        warnings.warn(text, UserWarning, stacklevel=3)
        return False
    return True


class _Dump:
    """Writes graphs as Python into the folder that `ZIPVL_DUMP` names."""

    def __init__(self) -> None:
        folder = os.environ.get("ZIPVL_DUMP")
        self.folder = Path(folder) / f"graph_{next(_dumps):03}" if folder else None
        self.places = itertools.count()

    def write(self, graph: Graph, name: str, moment: str) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        code = graph.python_code("self", verbose=True).src
        (self.folder / f"{next(self.places):02}_{name}_{moment}.py").write_text(code, encoding="utf-8")
