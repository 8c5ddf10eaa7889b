"""The queries of the newest tokens, kept from step to step, so that a re-selection can ask what they attend to.

    write_queries(queries [B, Hq, R, D], x [B, Hq, m, D], count)    in place: token i goes to row (count + i) mod R;
                                                                    `count` tokens were noted before
    in_order(queries, count)                                        [B, Hq, R, D], the oldest of the R newest first

A cache layer sees no queries: it traces `room_for_queries` of its keys, and `note_queries` of its key buffer, as
markers. A pass puts the queries, and operations that a compiler sees, in their place.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.common.checks import fail

torch.library.define("zipvl::room_for_queries", "(Tensor x, SymInt rows) -> Tensor")


@torch.library.impl("zipvl::room_for_queries", "CompositeImplicitAutograd")
def _room_for_queries(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_zeros(x.shape[0], x.shape[1], rows, x.shape[3])


@torch.library.custom_op("zipvl::note_queries", mutates_args=("queries",))
def _note_queries(queries: torch.Tensor, x: torch.Tensor, count: int) -> None:
    if (*x.shape[:2], x.shape[3]) != (*queries.shape[:2], queries.shape[3]):
        want = f"queries like {list(queries.shape)}"
        fail("note_queries", "x", want, list(x.shape), "Leave the pass note_queries in the pipeline.")
    write_queries(queries, x, count)


@_note_queries.register_fake
def _(queries, x, count):
    return None


def room_for_queries(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return room for so many queries like `x [B, Hq, n, D]`: zeros `[B, Hq, rows, D]`."""
    return torch.ops.zipvl.room_for_queries(x, rows)


def note_queries(queries: torch.Tensor, x: torch.Tensor, count: int) -> None:
    """Write queries, see `write_queries`.

    Raises:
        ValueError: x of other samples, heads or another head_dim than `queries`.
    """
    torch.ops.zipvl.note_queries(queries, x, count)


def write_queries(queries: torch.Tensor, x: torch.Tensor, count: int) -> None:
    """Write the queries `x [B, Hq, m, D]` of m new tokens over the oldest of `queries [B, Hq, R, D]`, in place.

    Args:
        count: of queries that were noted before (tokens).
    """
    rows, m = queries.shape[2], x.shape[2]
    places = count + torch.arange(m, device=x.device)[-rows:]
    queries.index_copy_(2, places % rows, x[:, :, -rows:].to(queries.dtype))


def in_order(queries: torch.Tensor, count: int) -> torch.Tensor:
    """Return noted queries `[B, Hq, R, D]`, the oldest first; of `count` tokens, at least R, the R newest are there."""
    return queries.index_select(2, (count + torch.arange(queries.shape[2], device=queries.device)) % queries.shape[2])
