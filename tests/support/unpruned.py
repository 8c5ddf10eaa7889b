"""zipvl without the passes that narrow what is computed around attention: what their results are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from zipvl_compile import pipeline


@contextlib.contextmanager
def without_pruning(demand: bool = False) -> Iterator[None]:
    """Leave `prune_projections` and, unless `demand`, `demand_rows` out of the graphs compiled inside."""
    whole = pipeline.PIPELINE
    pipeline.PIPELINE = pipeline.without("prune_projections", *(() if demand else ("demand_rows",)))
    try:
        yield
    finally:
        pipeline.PIPELINE = whole
