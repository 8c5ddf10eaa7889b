"""Which tokens a layer keeps.

    p_b = fewest tokens whose largest accumulated scores add up to >= tau * total_b,       p = max_b p_b
    P = min(n, p + keep_recent - 1 + m)
    kept_b = the keep_recent newest tokens, the m protected ones, and those with the largest accumulated / visible up to
             P, sorted by position

The newest token takes one place of `p`. Further tokens that are always kept come on top: inside `p`, 64 of them would
displace the attention sink. Protected tokens are given by position: those whose logits are read, wherever they stand.

`p` is data-dependent, so the size of the result is an unbacked symbol; with `keep_ratio`, or `tau = 1`, it is a
plain function of `n` and the host never waits for the device.

Sums are taken in fixed point, 2^-40 of a probe row's attention: integer sums do not depend on their order, so every
device counts the same p. The kernels sort nothing. Scores are not negative, so their bit patterns order as they do,
and a bisection over the 31 bits finds the score of the last token to keep: by sum for p, by count for the kept ones.

Source: ZipVL (arXiv 2410.08584), layer-wise adaptive ratio assignment and selection of important tokens.
"""

from __future__ import annotations

import struct
from fractions import Fraction

import torch
import triton
import triton.language as tl

from zipvl_compile.kernels.common.checks import fail
from zipvl_compile.kernels.common.dispatch import launchable, use_triton

FIXED = float(2**40)
MAX_BLOCK = 16384  # scores that one program holds in registers; longer prompts are read again for every bit
STEP = 8192  # scores at a time where a running count is needed, which goes through shared memory


def kept_count(n, keep_ratio: float, keep_recent):
    """Return P for `p = max(1, ceil(keep_ratio * n))`; `n` and `keep_recent` may be symbolic (tokens)."""
    ratio = Fraction(keep_ratio).limit_denominator(1_000_000)  # integer arithmetic: symbolic sizes have no ceil
    count = (n * ratio.numerator + ratio.denominator - 1) // ratio.denominator
    return torch.sym_min(torch.sym_max(count, 1) + keep_recent - 1, n)


def _fewest_tokens(accumulated: torch.Tensor, tau: float) -> torch.Tensor:
    """Return p of every sample and group of `accumulated [B, G, n]`: int64 `[B, G]`."""
    ordered = (accumulated.sort(-1, descending=True).values * FIXED).to(torch.int64)
    running = ordered.cumsum(-1)
    enough = tau * running[..., -1:].double()
    p = (running.double() < enough).sum(-1) + 1
    # NaN or inf somewhere in q or k: there is no ranking to trust, so keep all and give what dense gives.
    return torch.where(accumulated.isfinite().all(-1), p, accumulated.shape[-1])


def _best_tokens(accumulated: torch.Tensor, visible: torch.Tensor, p: int, keep_recent: int) -> torch.Tensor:
    """Return the positions of the newest tokens and of the best others, p in all, ascending: int64 `[B, G, p]`."""
    normalised = accumulated / visible.clamp(min=1).unsqueeze(1)
    # The newest visible tokens, counted from the end: with right padding they are not the last columns.
    shown = visible > 0
    newest = shown & (shown.flip(-1).cumsum(-1).flip(-1) <= keep_recent)
    normalised.masked_fill_(newest.unsqueeze(1), float("inf"))
    # Bits order as the scores do, NaN above all. Ties go to the lower position, so that runs and devices agree.
    batch, groups, n = normalised.shape
    bits = normalised.view(torch.int64 if normalised.dtype == torch.float64 else torch.int32)
    bits = torch.where(normalised.isnan(), torch.iinfo(bits.dtype).max, bits)
    last = bits.kthvalue(n - p + 1, keepdim=True).values
    better, tie = bits > last, bits == last
    keep = better | (tie & (tie.cumsum(-1) <= p - better.sum(-1, keepdim=True)))
    return keep.view(-1).nonzero().view(batch, groups, p) % n


@triton.jit
def _fewest_tokens_kernel(accumulated, out, n, tau_bits, FIXED: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores = accumulated + row * n
    at = tl.arange(0, BLOCK)
    held = tl.load(scores + at, mask=at < n, other=0.0)  # [BLOCK]
    total = tl.zeros([BLOCK], tl.int64)
    strange = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        x = held if ONE else tl.load(scores + start + at, mask=start + at < n, other=0.0)
        bits = x.to(tl.int32, bitcast=True)
        strange |= ((bits & 0x7F800000) == 0x7F800000).to(tl.int32)
        total += (x * FIXED).to(tl.int64)
    tau = tl.cast(tau_bits, tl.float64, bitcast=True)
    enough = tl.ceil(tau * tl.sum(total, 0).to(tl.float64)).to(tl.int64)
    last = 0  # bits of the largest score from which on the scores add up to enough
    for bit in range(31):
        candidate = last | (1 << (30 - bit))
        above = tl.zeros([BLOCK], tl.int64)
        for start in range(0, n, BLOCK):
            x = held if ONE else tl.load(scores + start + at, mask=start + at < n, other=0.0)
            above += tl.where(x.to(tl.int32, bitcast=True) >= candidate, (x * FIXED).to(tl.int64), 0)
        last = tl.where(tl.sum(above, 0) >= enough, candidate, last)
    larger = tl.zeros([BLOCK], tl.int32)
    above = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        x = held if ONE else tl.load(scores + start + at, mask=start + at < n, other=0.0)
        is_larger = x.to(tl.int32, bitcast=True) > last
        larger += is_larger.to(tl.int32)
        above += tl.where(is_larger, (x * FIXED).to(tl.int64), 0)
    missing = enough - tl.sum(above, 0)
    one = tl.maximum((tl.cast(last, tl.float32, bitcast=True) * FIXED).to(tl.int64), 1)
    p = tl.sum(larger, 0) + ((missing + one - 1) // one).to(tl.int32)
    p = tl.where(enough == 0, 1, tl.where(tl.max(strange, 0) != 0, n, p))
    tl.store(out + row, p)


@triton.jit
def _ranking_bits(accumulated, visible, at, n, newest):
    """Bits of the normalised score, which order as it does; the newest tokens rank as infinity."""
    inside = at < n
    seen = tl.load(visible + at, mask=inside, other=1.0)
    x = tl.div_rn(tl.load(accumulated + at, mask=inside, other=0.0), tl.maximum(seen, 1.0))
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    bits = tl.where((at >= newest) & (seen > 0), 0x7F800000, bits)
    return tl.where(inside, bits, -1)


@triton.jit
def _best_tokens_kernel(
    accumulated, visible, out, n, p, keep_recent,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    accumulated += row * n
    visible += row // GROUPS * n
    out += row * p
    step = tl.arange(0, STEP)
    shown = tl.zeros([STEP], tl.int32)
    for start in range(0, n, STEP):
        shown += (tl.load(visible + start + step, mask=start + step < n, other=0.0) > 0).to(tl.int32)
    older = tl.sum(shown, 0) - keep_recent  # visible tokens before the newest ones
    newest = n  # position of the first of the newest visible tokens
    before = 0
    for start in range(0, n, STEP):
        seen = (tl.load(visible + start + step, mask=start + step < n, other=0.0) > 0).to(tl.int32)
        rank = before + tl.cumsum(seen, 0) - 1
        newest = tl.minimum(newest, tl.min(tl.where((seen != 0) & (rank >= older), start + step, n), 0))
        before += tl.sum(seen, 0)

    at = tl.arange(0, BLOCK)
    held = _ranking_bits(accumulated, visible, at, n, newest)  # [BLOCK]
    last = 0  # bits of the score of the p-th best token
    for bit in range(31):
        candidate = last | (1 << (30 - bit))
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n, BLOCK):
            bits = held if ONE else _ranking_bits(accumulated, visible, start + at, n, newest)
            count += (bits >= candidate).to(tl.int32)
        last = tl.where(tl.sum(count, 0) >= p, candidate, last)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        bits = held if ONE else _ranking_bits(accumulated, visible, start + at, n, newest)
        count += (bits > last).to(tl.int32)
    wanted = p - tl.sum(count, 0)  # of the tokens that tie with the p-th, the first ones
    ties = 0
    written = 0
    for start in range(0, n, STEP):
        bits = _ranking_bits(accumulated, visible, start + step, n, newest)
        tie = (bits == last).to(tl.int32)
        keep = (bits > last) | ((tie != 0) & (ties + tl.cumsum(tie, 0) <= wanted))
        rank = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(out + rank, (start + step).to(tl.int64), mask=keep)
        ties += tl.sum(tie, 0)
        written += tl.sum(keep.to(tl.int32), 0)


def _tiling(n: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(n), MAX_BLOCK)
    return {"BLOCK": block, "ONE": n <= block, "num_warps": min(max(block // 512, 1), 16 if torch.version.hip else 32)}


def _fewest_tokens_triton(accumulated: torch.Tensor, tau: float) -> torch.Tensor:
    out = torch.empty(accumulated.shape[:2], dtype=torch.int32, device=accumulated.device)
    n = accumulated.shape[2]
    (tau_bits,) = struct.unpack("<q", struct.pack("<d", tau))  # Triton would pass a float as fp32
    launchable(_fewest_tokens_kernel, accumulated)[(out.numel(),)](
        accumulated.contiguous(), out, n, tau_bits, FIXED=FIXED, **_tiling(n)
    )
    return out


def _best_tokens_triton(accumulated: torch.Tensor, visible: torch.Tensor, p: int, keep_recent: int) -> torch.Tensor:
    batch, groups, n = accumulated.shape
    out = torch.empty(batch, groups, p, dtype=torch.int64, device=accumulated.device)
    launchable(_best_tokens_kernel, accumulated)[(batch * groups,)](
        accumulated.contiguous(),
        visible.contiguous(),
        out,
        n,
        p,
        keep_recent,
        GROUPS=groups,
        STEP=min(triton.next_power_of_2(n), STEP),
        **_tiling(n),
    )
    return out


def _always_kept(keep_recent, protected: torch.Tensor | None):
    """Return how many tokens are kept whatever their scores, at most (tokens)."""
    return keep_recent if protected is None else keep_recent + protected.shape[0]


@torch.library.custom_op("zipvl::select_tokens", mutates_args=())
def _select_tokens(
    accumulated: torch.Tensor,
    visible: torch.Tensor,
    tau: float,
    keep_ratio: float | None,
    keep_recent: int,
    protected: torch.Tensor | None = None,
    kernel_: str = "auto",
) -> torch.Tensor:
    if accumulated.dim() != 3 or visible.dim() != 2 or accumulated.shape[::2] != visible.shape:
        fail(
            "select_tokens", "accumulated, visible", "[batch, groups, n] and [batch, n] tensors",
            f"{list(accumulated.shape)}, {list(visible.shape)}", "Pass what token_scores returned.",
        )  # fmt: skip
    if protected is not None and (protected.dim() != 1 or protected.dtype != torch.int64):
        got = f"{protected.dtype} {list(protected.shape)}"
        fail("select_tokens", "protected", "positions, int64 [m]", got, "Pass the same positions for every sample.")
    batch, groups, n = accumulated.shape
    always = _always_kept(keep_recent, protected)
    on_triton = accumulated.numel() > 0 and use_triton("select_tokens", kernel_, accumulated, visible)
    if keep_ratio is not None:
        p = kept_count(n, keep_ratio, always)
    elif tau >= 1.0 or accumulated.numel() == 0:
        p = n
    else:
        counts = (_fewest_tokens_triton if on_triton else _fewest_tokens)(accumulated, tau)
        p = min(int(counts.max()) + always - 1, n)  # the one host read
    if p == n:
        return torch.arange(n, device=accumulated.device).repeat(batch, groups, 1)
    if protected is not None:
        accumulated = accumulated.index_fill(2, protected % n, float("inf"))  # they rank with the newest ones
    return (_best_tokens_triton if on_triton else _best_tokens)(accumulated, visible, p, keep_recent)


@_select_tokens.register_fake
def _(accumulated, visible, tau, keep_ratio, keep_recent, protected=None, kernel_="auto"):
    batch, groups, n = accumulated.shape
    if keep_ratio is not None:
        p = kept_count(n, keep_ratio, _always_kept(keep_recent, protected))
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
    protected: torch.Tensor | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Choose the tokens to keep.

    Args:
        accumulated: `[B, G, n]` accumulated scores, not negative, see `token_scores`.
        visible: `[B, n]` number of probe rows that may see each token.
        tau: fraction of the accumulated score to keep, in (0, 1]; 1 keeps every token.
        keep_ratio: fixed fraction of tokens instead of `tau`, in (0, 1].
        keep_recent: newest visible tokens that are always kept. One takes a place of those that `tau` or
            `keep_ratio` asks for, the others come on top.
        protected: int64 `[m]`, positions of further tokens that every sample keeps on top of all others, visible or
            not; negative ones count from the end.
        kernel: "auto", "triton" or "torch", see `dispatch.use_triton`.

    Returns:
        int64 `[B, G, P]`, ascending positions. `P` is the largest count that a sample needs, `keep_recent - 1` and
        `m`; the others keep their next best tokens. A non-finite score keeps every token.

    Raises:
        ValueError: scores whose shapes do not fit, or fractions outside (0, 1].

    Source: ZipVL (arXiv 2410.08584), layer-wise adaptive ratio assignment.
    """
    for name, value in (("tau", tau), ("keep_ratio", keep_ratio)):
        if value is not None and not 0 < value <= 1:
            fail("select_tokens", name, "a fraction in (0, 1]", value, "Use 1.0 to keep every token.")
    if keep_recent < 1:
        fail("select_tokens", "keep_recent", "at least 1 token", keep_recent, "The newest token must be kept.")
    return torch.ops.zipvl.select_tokens(accumulated, visible, tau, keep_ratio, keep_recent, protected, kernel)
