"""Which tokens a layer keeps.

    p_b = fewest tokens whose largest accumulated scores add up to >= tau * total_b,       p = max_b p_b   (budget.py)
    P = min(n, p + keep_recent - 1 + keep_first + m)
    kept_b = the keep_recent newest tokens, the keep_first first ones, the m protected ones, and those that rank highest
             up to P, sorted by position

Tokens rank by accumulated / visible (the paper), or by another score that is given. The newest token takes one place of
`p`. Further tokens that are always kept come on top: inside `p`, 64 of them would displace the attention sink.
Protected tokens are given by position: those whose logits are read, wherever they stand.

`p` is data-dependent, so the size of the result is an unbacked symbol; with `keep_ratio`, `keep_tokens` or `tau = 1`
the host never waits for the device, and without a `budget` tensor the size is a plain function of `n`.

Sums are taken in fixed point, 2^-40 of a probe row's attention: integer sums do not depend on their order, so every
device counts the same p.

Source: ZipVL (arXiv 2410.08584), layer-wise adaptive ratio assignment and selection of important tokens.
"""

from __future__ import annotations

import torch

from zipvl_compile.kernels.budget import Budget
from zipvl_compile.kernels.common.checks import fail
from zipvl_compile.kernels.common.dispatch import use_triton
from zipvl_compile.kernels.select_tokens_torch import best_tokens, fewest_tokens, protect
from zipvl_compile.kernels.select_tokens_triton import best_tokens_triton, fewest_tokens_triton


def _always_kept(keep_recent, keep_first: int, protected: torch.Tensor | None):
    """Return how many tokens are kept on top of p, at most (tokens)."""
    return keep_recent - 1 + keep_first + (0 if protected is None else protected.shape[0])


@torch.library.custom_op("zipvl::select_tokens", mutates_args=())
def _select_tokens(
    accumulated: torch.Tensor, visible: torch.Tensor, tau: float, keep_ratio: float | None, keep_recent: int,
    protected: torch.Tensor | None = None, keep_tokens: int | None = None, floor: float = 0.0, keep_first: int = 0,
    ranking: torch.Tensor | None = None, budget: torch.Tensor | None = None, kernel_: str = "auto",
) -> torch.Tensor:  # fmt: skip
    _check(accumulated, visible, ranking, protected)
    given = Budget(tau, keep_ratio, keep_tokens, floor) if budget is None else Budget.read(budget)
    batch, groups, n = accumulated.shape
    scores = accumulated if ranking is None else ranking
    on_triton = accumulated.numel() > 0 and use_triton("select_tokens", kernel_, accumulated, visible, scores)
    p = given.least(n)
    if not given.fixed and accumulated.numel() > 0:
        counts = (fewest_tokens_triton if on_triton else fewest_tokens)(accumulated, given.tau)
        p = max(int(counts.max()), p)  # the one host read
    p = min(p + _always_kept(keep_recent, keep_first, protected), n)
    if p == n or accumulated.numel() == 0:
        return torch.arange(n, device=accumulated.device).repeat(batch, groups, 1)
    if keep_first or protected is not None:
        scores = protect(scores, visible, keep_first, protected)
    return (best_tokens_triton if on_triton else best_tokens)(scores, visible, p, keep_recent, ranking is None)


@_select_tokens.register_fake
def _(
    accumulated, visible, tau, keep_ratio, keep_recent, protected=None, keep_tokens=None, floor=0.0, keep_first=0,
    ranking=None, budget=None, kernel_="auto",
):  # fmt: skip
    batch, groups, n = accumulated.shape
    given = Budget(tau, keep_ratio, keep_tokens, floor)
    if budget is None and given.fixed:
        p = torch.sym_min(given.least(n) + _always_kept(keep_recent, keep_first, protected), n)
    else:
        p = torch.library.get_ctx().new_dynamic_size()
    return accumulated.new_empty(batch, groups, p, dtype=torch.int64)


def _check(accumulated, visible, ranking, protected) -> None:
    if accumulated.dim() != 3 or visible.dim() != 2 or accumulated.shape[::2] != visible.shape:
        fail(
            "select_tokens", "accumulated, visible", "[batch, groups, n] and [batch, n] tensors",
            f"{list(accumulated.shape)}, {list(visible.shape)}", "Pass what token_scores returned.",
        )  # fmt: skip
    if ranking is not None and ranking.shape != accumulated.shape:
        want, got = f"scores {list(accumulated.shape)}", f"{list(ranking.shape)}"
        fail("select_tokens", "ranking", want, got, "Pass one score for each accumulated one.")
    if protected is not None and (protected.dim() != 1 or protected.dtype != torch.int64):
        got = f"{protected.dtype} {list(protected.shape)}"
        fail("select_tokens", "protected", "positions, int64 [m]", got, "Pass the same positions for every sample.")


def select_tokens(
    accumulated: torch.Tensor,
    visible: torch.Tensor,
    *,
    tau: float = 0.975,
    keep_ratio: float | None = None,
    keep_recent: int = 1,
    protected: torch.Tensor | None = None,
    keep_tokens: int | None = None,
    floor: float = 0.0,
    keep_first: int = 0,
    ranking: torch.Tensor | None = None,
    budget: torch.Tensor | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Choose the tokens to keep.

    Args:
        accumulated: `[B, G, n]` accumulated scores, not negative, see `token_scores`.
        visible: `[B, n]` number of probe rows that may see each token.
        tau, keep_ratio, keep_tokens, floor: how many to keep, see `Budget`.
        keep_recent: newest visible tokens that are always kept. One takes a place of those that the budget asks for,
            the others come on top.
        protected: int64 `[m]`, positions of further tokens that every sample keeps on top of all others, visible or
            not; negative ones count from the end.
        keep_first: first visible tokens that are always kept, on top.
        ranking: `[B, G, n]` scores that tokens rank by, not negative; None is `accumulated / visible`.
        budget: float64 `[4]` on the CPU, `Budget.as_tensor` of other numbers than those above; None uses them.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        int64 `[B, G, P]`, ascending positions. `P` is the largest count that a sample needs and what comes on top;
        samples that need fewer keep their next best tokens. A non-finite score keeps every token, unless the number is
        fixed.

    Raises:
        ValueError: scores whose shapes do not fit, or numbers outside their range.

    Source: ZipVL (arXiv 2410.08584), layer-wise adaptive ratio assignment.
    """
    Budget(tau, keep_ratio, keep_tokens, floor).check("select_tokens")
    if keep_recent < 1:
        fail("select_tokens", "keep_recent", "at least 1 token", keep_recent, "The newest token must be kept.")
    if keep_first < 0:
        fail("select_tokens", "keep_first", "at least 0 tokens", keep_first, "Use 0 to protect none.")
    return torch.ops.zipvl.select_tokens(
        accumulated, visible, tau, keep_ratio, keep_recent, protected, keep_tokens, floor, keep_first, ranking, budget,
        kernel,
    )  # fmt: skip
