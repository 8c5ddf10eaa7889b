"""The kernels of select_tokens. They sort nothing.

Scores are not negative, so their bit patterns order as they do, and a bisection over the 31 bits finds the score of the
last token to keep: by sum for p, by count for the kept ones.
"""

from __future__ import annotations

import struct

import torch

from zipvl_compile.kernels.common.dispatch import launchable
from zipvl_compile.kernels.common.language import tl, triton
from zipvl_compile.kernels.select_tokens_torch import FIXED

MAX_BLOCK = 16384  # scores that one program holds in registers; longer prompts are read again for every bit
STEP = 8192  # scores at a time where a running count is needed, which goes through shared memory


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
def _ranking_bits(scores, visible, at, n, newest, NORMALISE: tl.constexpr):
    """Bits of the score, divided by `visible` or not, which order as it does; the newest tokens rank as infinity."""
    inside = at < n
    seen = tl.load(visible + at, mask=inside, other=1.0)
    x = tl.load(scores + at, mask=inside, other=0.0)
    if NORMALISE:
        x = tl.div_rn(x, tl.maximum(seen, 1.0))
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    bits = tl.where((at >= newest) & (seen > 0), 0x7F800000, bits)
    return tl.where(inside, bits, -1)


@triton.jit
def _best_tokens_kernel(
    scores, visible, out, n, p, keep_recent,
    GROUPS: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * n
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
    held = _ranking_bits(scores, visible, at, n, newest, NORMALISE)  # [BLOCK]
    last = 0  # bits of the score of the p-th best token
    for bit in range(31):
        candidate = last | (1 << (30 - bit))
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n, BLOCK):
            bits = held if ONE else _ranking_bits(scores, visible, start + at, n, newest, NORMALISE)
            count += (bits >= candidate).to(tl.int32)
        last = tl.where(tl.sum(count, 0) >= p, candidate, last)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        bits = held if ONE else _ranking_bits(scores, visible, start + at, n, newest, NORMALISE)
        count += (bits > last).to(tl.int32)
    wanted = p - tl.sum(count, 0)  # of the tokens that tie with the p-th, the first ones
    ties = 0
    written = 0
    for start in range(0, n, STEP):
        bits = _ranking_bits(scores, visible, start + step, n, newest, NORMALISE)
        tie = (bits == last).to(tl.int32)
        keep = (bits > last) | ((tie != 0) & (ties + tl.cumsum(tie, 0) <= wanted))
        rank = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(out + rank, (start + step).to(tl.int64), mask=keep)
        ties += tl.sum(tie, 0)
        written += tl.sum(keep.to(tl.int32), 0)


def _tiling(n: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(n), MAX_BLOCK)
    return {"BLOCK": block, "ONE": n <= block, "num_warps": min(max(block // 512, 1), 16 if torch.version.hip else 32)}


def fewest_tokens_triton(accumulated: torch.Tensor, tau: float) -> torch.Tensor:
    out = torch.empty(accumulated.shape[:2], dtype=torch.int32, device=accumulated.device)
    n = accumulated.shape[2]
    (tau_bits,) = struct.unpack("<q", struct.pack("<d", tau))  # Triton would pass a float as fp32
    launchable(_fewest_tokens_kernel, accumulated)[(out.numel(),)](
        accumulated.contiguous(), out, n, tau_bits, FIXED=FIXED, **_tiling(n)
    )
    return out


def best_tokens_triton(
    scores: torch.Tensor, visible: torch.Tensor, p: int, keep_recent: int, normalise: bool
) -> torch.Tensor:
    """As `best_tokens`, for fp32."""
    batch, groups, n = scores.shape
    out = torch.empty(batch, groups, p, dtype=torch.int64, device=scores.device)
    launchable(_best_tokens_kernel, scores)[(batch * groups,)](
        scores.contiguous(),
        visible.contiguous(),
        out,
        n,
        p,
        keep_recent,
        GROUPS=groups,
        NORMALISE=normalise,
        STEP=min(triton.next_power_of_2(n), STEP),
        **_tiling(n),
    )
    return out
