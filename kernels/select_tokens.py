"""Which tokens a layer keeps.

    p_b = fewest tokens whose largest accumulated scores add up to >= tau * total_b,       p = max_b p_b
    kept_b = the p tokens with the largest accumulated / visible, the newest ones always, sorted by position

`p` is data-dependent, so the size of the result is an unbacked symbol; with `keep_ratio`, or `tau = 1`, it is a
plain function of `n` and the host never waits for the device.

Source: ZipVL (arXiv 2410.08584), layer-wise adaptive ratio assignment and selection of important tokens.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from zipvl_compile.kernels.checks import fail


def kept_count(n, keep_ratio: float, keep_recent: int):
    """Return `ceil(keep_ratio * n)`, from `keep_recent` to `n`; `n` may be a symbolic size (tokens)."""
    ratio = Fraction(keep_ratio).limit_denominator(1_000_000)  # integer arithmetic: symbolic sizes have no ceil
    count = (n * ratio.numerator + ratio.denominator - 1) // ratio.denominator
    return torch.sym_min(torch.sym_max(count, keep_recent), n)


def _fewest_tokens(accumulated: torch.Tensor, tau: float) -> int:
    """Return p over `accumulated [B, G, n]`: the largest, over samples and groups, of the per-sample counts."""
    n = accumulated.shape[-1]
    if accumulated.numel() == 0:
        return n
    ordered = accumulated.sort(-1, descending=True).values
    running = ordered.cumsum(-1, dtype=torch.float64)
    enough = tau * running[..., -1:]
    # NaN or inf somewhere in q or k: there is no ranking to trust, so keep all and give what dense gives.
    p = torch.where(enough.isfinite().all(), (running < enough).sum(-1).max() + 1, n)
    return min(int(p), n)


@torch.library.custom_op("zipvl::select_tokens", mutates_args=())
def _select_tokens(
    accumulated: torch.Tensor,
    visible: torch.Tensor,
    tau: float,
    keep_ratio: float | None,
    keep_recent: int,
    kernel: str = "auto",
) -> torch.Tensor:
    if accumulated.dim() != 3 or visible.dim() != 2 or accumulated.shape[::2] != visible.shape:
        fail(
            "select_tokens", "accumulated, visible", "[batch, groups, n] and [batch, n] tensors",
            f"{list(accumulated.shape)}, {list(visible.shape)}", "Pass what token_scores returned.",
        )  # fmt: skip
    batch, groups, n = accumulated.shape
    if keep_ratio is not None:
        p = kept_count(n, keep_ratio, keep_recent)
    elif tau >= 1.0:
        p = n
    else:
        p = min(max(_fewest_tokens(accumulated, tau), keep_recent), n)
    if p == n:
        return torch.arange(n, device=accumulated.device).repeat(batch, groups, 1)
    normalised = accumulated / visible.clamp(min=1).unsqueeze(1)
    # The newest visible tokens, counted from the end: with right padding they are not the last columns.
    shown = visible > 0
    newest = shown & (shown.flip(-1).cumsum(-1).flip(-1) <= keep_recent)
    normalised.masked_fill_(newest.unsqueeze(1), float("inf"))
    # A stable sort gives ties to the lower position, so that runs and devices agree.
    order = normalised.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :p].sort(-1).values


@_select_tokens.register_fake
def _(accumulated, visible, tau, keep_ratio, keep_recent, kernel="auto"):
    batch, groups, n = accumulated.shape
    if keep_ratio is not None:
        p = kept_count(n, keep_ratio, keep_recent)
    elif tau >= 1.0:
        p = n
    else:
        p = torch.library.get_ctx().new_dynamic_size()
    return accumulated.new_empty(batch, groups, p, dtype=torch.int64)


def select_tokens(
    accumulated: torch.Tensor,
    visible: torch.Tensor,
    *,
    tau: float = 0.975,
    keep_ratio: float | None = None,
    keep_recent: int = 1,
    kernel: str = "auto",
) -> torch.Tensor:
    """Choose the tokens to keep.

    Args:
        accumulated: `[B, G, n]` accumulated scores, see `token_scores`.
        visible: `[B, n]` number of probe rows that may see each token.
        tau: fraction of the accumulated score to keep, in (0, 1]; 1 keeps every token.
        keep_ratio: fixed fraction of tokens instead of `tau`, in (0, 1].
        keep_recent: newest visible tokens that are always kept.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        int64 `[B, G, P]`, ascending positions. `P` is the largest count that a sample needs; the others keep their
        next best tokens. A non-finite score keeps every token.

    Raises:
        ValueError: scores whose shapes do not fit, or fractions outside (0, 1].

    Source: ZipVL (arXiv 2410.08584), layer-wise adaptive ratio assignment.
    """
    for name, value in (("tau", tau), ("keep_ratio", keep_ratio)):
        if value is not None and not 0 < value <= 1:
            fail("select_tokens", name, "a fraction in (0, 1]", value, "Use 1.0 to keep every token.")
    if keep_recent < 1:
        fail("select_tokens", "keep_recent", "at least 1 token", keep_recent, "The newest token must be kept.")
    return torch.ops.zipvl.select_tokens(accumulated, visible, tau, keep_ratio, keep_recent, kernel)
