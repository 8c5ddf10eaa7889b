"""zipvl without the passes that narrow what is computed around attention: what their results are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from zipvl_compile import pipeline
from zipvl_compile.passes.match.outcome import PassReport


@contextlib.contextmanager
def without_pruning(demand: bool = False) -> Iterator[None]:
    """Leave `prune_projections` and, unless `demand`, `demand_rows` out of the graphs compiled inside."""
    passes = (pipeline.prune_projections, *(() if demand else (pipeline.demand_rows,)))
    applied = [one.apply for one in passes]
    for one in passes:
        one.apply = lambda graph: PassReport("left out")
    try:
        yield
    finally:
        for one, apply in zip(passes, applied, strict=True):
            one.apply = apply
