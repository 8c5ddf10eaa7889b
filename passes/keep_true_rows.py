"""Which prefill attentions must give true rows, since what reads them cannot take rows of zeros.

The paper gives zero to a token that was not selected, and the layer's projection then reads a row of zeros. Linear maps
and norms with an epsilon take it; a projection that scales each token, as dynamic int8 may, divides zero by zero, and
of an operation that nobody knows nothing can be said. Nor does `queries="all"` help: a query that may see none of the
kept tokens, as the first one of a causal prompt whose first token is not kept, has a row of zeros, too.

So nothing is rewritten here; a site is marked, and by a rule that gives rows of zeros `sparsify_prefill` leaves its
attention dense and compacts its cache all the same. Every row that the layer reads is then the model's own, which is
sound for any function, row by row or not. Computing the kept rows only and giving zero to the others after the
projection would need a proof that the projection treats each token by itself, and a guess where it ends; the row of an
unselected token would be one that no model computes. Rules with a window need none of that: a token sees itself.

Which operations may see zeros is decided by `tokenwise/zero_rows.py`. Rows that leave the graph, as at a graph break
between an attention and its projection, count as read by something unknown.
"""

from __future__ import annotations

from torch.fx import Graph

from zipvl_compile.passes.match import reasons
from zipvl_compile.passes.match.sites import Site, Sites
from zipvl_compile.passes.settings import Settings
from zipvl_compile.passes.tokenwise import zero_rows
from zipvl_compile.passes.tokenwise.axis_rules import rank


def refusal(site: Site) -> str:
    """Return why rows of an attention may not be zero, or an empty string."""
    try:
        return zero_rows.refusal(site.node, rank(site.node) - 2)
    except Exception as error:  # a fault of ours must not break the user's compile
        return str(reasons.fault(error))


def apply(graph: Graph, sites: Sites, settings: Settings) -> None:
    """Mark the sites whose rows may not be zero."""
    for site in sites.prefill:
        site.needs_true_rows = refusal(site)
