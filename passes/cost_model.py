"""What prefill attention costs dense and sparse, as formulas in the prompt length, and from which length sparse pays.

    dense  = B Hq (D + Dv) (attend n^2 + edge n) / 2 * mask + B product work n
    sparse = site + B [ (score + multiply D) Hq m n  +  token n                      scores, selection
                        + byte (Hkv (D + Dv) + 2 Hq D + Hq Dv) p  +  byte Hq Dv n    gathers of K, V, Q; rows put back
                        + Hq (D + Dv) (attend p^2 + edge p) / 2 * mask               attention among kept tokens
                        + Hq (D + Dv) (2 attend local n + edge n) / 2                attention to a window
                        + product work p ]                                           what tokens pass with the layer

with p = r n kept tokens (n p instead of p^2, and n instead of the p beside `edge`, where every query attends) and m
probe rows; the lower-case words are seconds per unit, measured on the machine at hand. `edge` is what a blocked kernel
computes on the causal diagonal and throws away, `mask` what a mask in memory costs where there is one: transformers
gives dense attention one, and sparse attention often needs none. `work` is what a token that passes the layer saves,
where that is asked for (`skip_layers`). Projections that `prune_projections` narrows besides only add to the gain; they
are left out, since it may find nothing to prune.

A GPU works while the host prepares what comes next. There, `site` is what the GPU itself loses, and the `host` time of
a site counts only as far as the layer leaves the GPU too little to do meanwhile: a decoder block multiplies about
12 (Hq D)^2 numbers per token besides attention.

    sparse + max(host - 12 product B (Hq D)^2 n, 0)

A break-even length is the largest root of (1 + slack) dense - sparse, a quadratic in n. It becomes a guard of the
compiled graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass

import sympy

from zipvl_compile.passes.match.attention_site import AttentionShape

n, r = sympy.symbols("n r", positive=True)
B, Hq, Hkv, D, Dv, m, size = sympy.symbols("B Hq Hkv D Dv m size", positive=True)
every, dense_mask, sparse_mask = sympy.symbols("every dense_mask sparse_mask", nonnegative=True)  # 1 or 0
local, work = sympy.symbols("local work", nonnegative=True)
attend, edge, multiply, score, token, byte, site, host, product, masked = sympy.symbols(
    "attend edge multiply score token byte site host product masked", nonnegative=True
)

DENSE = B * Hq * (D + Dv) / 2 * (attend * n**2 + edge * n) * (1 + masked * dense_mask) + B * product * work * n
CHOICE = site + B * ((score + multiply * D) * Hq * m * n + token * n)
CACHED = B * byte * size * Hkv * (D + Dv) * r * n
GATHERS = CACHED + B * byte * size * ((2 * Hq * D + Hq * Dv) * r * n + Hq * Dv * n)
AMONG_KEPT = B * Hq * (D + Dv) / 2 * (attend * n**2 * r ** (2 - every) + edge * n * r ** (1 - every))
TO_WINDOW = B * Hq * (D + Dv) / 2 * (2 * attend * local + edge * sympy.Min(local, 1)) * n
SPARSE = CHOICE + GATHERS + AMONG_KEPT * (1 + masked * sparse_mask) + TO_WINDOW + B * product * work * r * n
MEANWHILE = 12 * product * B * (Hq * D) ** 2 * n
WAIT = sympy.Max(host - MEANWHILE, 0)
NEVER = 1 << 62  # tokens


@dataclass(frozen=True)
class Machine:
    """Seconds per unit of work, measured.

    Attributes:
        attend: of one multiply-add inside dense attention.
        edge: of dense attention besides that, per query and element of head_dim.
        multiply: of one multiply-add of the probe rows' scores.
        score: of one probe score besides that: softmax and sums.
        token: of selecting among the scores, per prompt token.
        byte: of gathering, per byte.
        site: of one sparse attention, whatever its size.
        host: of the host for a sparse attention, beyond that for a dense one; 0 where the host does the work itself.
        product: of one multiply-add of a large matrix product.
        masked: what a mask in memory adds to dense attention, as a fraction of its time; no seconds.
    """

    attend: float
    edge: float
    multiply: float
    score: float
    token: float
    byte: float
    site: float
    host: float = 0.0
    product: float = 0.0
    masked: float = 0.0


def _values(shape: AttentionShape, machine: Machine) -> dict[sympy.Symbol, float]:
    of_shape = (B, Hq, Hkv, D, Dv, m, size, every, dense_mask, sparse_mask, local, work)
    of_machine = (attend, edge, multiply, score, token, byte, site, host, product, masked)
    numbers = (*astuple(shape)[: len(of_shape)], *astuple(machine))
    return dict(zip((*of_shape, *of_machine), map(float, numbers), strict=True))


@functools.cache
def break_even(shape: AttentionShape, machine: Machine, kept: float, slack: float = 0.0) -> int:
    """Return the prompt length from which sparse attention is faster, in tokens; `NEVER` where it never is.

    Args:
        kept: fraction of the tokens that the layer is expected to keep, in (0, 1].
        slack: by how much sparse attention may be slower all the same, a fraction of the time of dense attention.
    """
    values = _values(shape, machine) | {r: kept}
    gain = ((1 + slack) * DENSE - SPARSE).subs(values)
    if not machine.host:
        return _from(gain)
    meanwhile = float(MEANWHILE.subs(values | {n: 1}))
    hidden = math.ceil(machine.host / meanwhile) if machine.host < NEVER * meanwhile else NEVER
    # The host's time is hidden from that length on, or it is paid.
    return min(max(_from(gain), hidden), _from(gain - machine.host))


@functools.cache
def choice_below(shape: AttentionShape, machine: Machine, share: float) -> int:
    """Return the prompt length from which choosing tokens takes at most `share` of dense attention, in tokens.

    That is what a layer loses that then attends to all of them.
    """
    return _from((share * DENSE - CHOICE).subs(_values(shape, machine)))


def _from(gain: sympy.Expr) -> int:
    """Return from which n on `gain`, quadratic in n, is not negative."""
    gain = sympy.Poly(gain, n)
    if gain.degree() < 2 or gain.LC() <= 0:
        return NEVER
    roots = [float(root) for root in gain.nroots() if root.is_real]
    return max(math.ceil(max(roots, default=0.0)), 0)


def seconds(shape: AttentionShape, machine: Machine, tokens: int, kept: float) -> tuple[float, float]:
    """Return the predicted time of dense and of sparse attention over a prompt, in seconds.

    Where so much is kept that it attends to all tokens, the latter is the choice, the gathers of the cache, and the
    former.

    Args:
        tokens: prompt length.
        kept: fraction of the tokens that the layer keeps, in (0, 1].
    """
    given = _values(shape, machine) | {n: tokens, r: kept}
    sparse = CHOICE + CACHED + DENSE if kept >= shape.dense_from else SPARSE
    return float(DENSE.subs(given)), float((sparse + WAIT).subs(given))
