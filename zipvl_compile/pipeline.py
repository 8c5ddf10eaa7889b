"""The passes, in order."""

from __future__ import annotations

from torch.fx import Graph

from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes import (
    choose_kernels,
    demand_rows,
    fuse_gathers,
    keep_every_token,
    prune_projections,
    read_compact_cache,
    sparsify_prefill,
    unmask_dense,
)
from zipvl_compile.passes.match import left_dense as leave_dense
from zipvl_compile.passes.match.outcome import PassReport
from zipvl_compile.report.costs import least_tokens


def rewrite(graph: Graph, options: ZipVLOptions) -> list[PassReport]:
    """Run the passes over a Dynamo graph, in place; return what each did."""
    reports = [
        sparsify_prefill.apply(
            graph,
            min_tokens=least_tokens(options),
            tau=options.tau,
            keep_ratio=options.keep_ratio,
            recent=options.recent_probes,
            random=options.random_probes,
            seed=options.seed,
            keep_recent=options.keep_recent,
            all_queries=options.queries == "all",
            drop=options.evict == "drop",
        ),
        read_compact_cache.apply(graph),
        leave_dense.apply(graph),
        demand_rows.apply(graph),
        prune_projections.apply(graph),
    ]
    unmask_dense.apply(graph)
    keep_every_token.apply(graph)
    fuse_gathers.apply(graph)
    choose_kernels.apply(graph, options.kernel)
    graph.lint()
    return reports
