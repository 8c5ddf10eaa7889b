"""A selection rule, as data: passes and operators do what it says, and know no rule by name.

    probes ──> scores ──> budget ──> kept tokens ──> attention among them; rows that are not kept get `unselected`

One file of `zipvl_compile/policies/` states one; every field is also an option of the backend, with the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from typing_extensions import Self

from zipvl_compile.kernels.budget import Budget
from zipvl_compile.kernels.probe_rows import STRIDED

EVERY_ROW = 1 << 30  # probe rows: more than any prompt has

Score = Literal["normalised", "accumulated", "even", "value", "recent", "random"]
Unselected = Literal["zero", "hold", "window", "all"]
Skip = Literal["attention", "layer"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tokens a layer keeps, and what the others get.

    Attributes:
        recent_probes: newest rows that measure attention (tokens).
        random_probes: rows drawn from the rest (tokens); `EVERY_ROW` of either takes all.
        draw: how: "random", or "strided" at equal distances.
        seed: of the random draw, and of the score "random".
        score: what tokens rank by. "normalised": attention by the probe rows that may see the token, on average (the
            paper); "accumulated": its sum; "even": as normalised, each row weighed by the share of the prompt that it
            sees, which favours no early token; "value": as normalised, times the norm of the value; "recent": the
            newest first; "random": drawn.
        pooling: average of that many neighbouring scores, odd; 1 is none (tokens).
        tau, keep_ratio, keep_tokens, floor: how many tokens a layer keeps, see `Budget`.
        keep_recent: newest tokens that are always kept.
        keep_first: first tokens that are always kept, on top of the budget.
        unselected: attention output of tokens that are not kept: "zero" (the paper); "hold", that of the kept token
            before them; "window", of their own over their `window` newest keys and the `sinks` first ones; "all", of
            their own over the kept keys.
        window, sinks: of "window" (tokens).
        kept_window: kept tokens see their window and the sinks, besides kept tokens; so does every token with
            `unselected="all"`. There is no window with "zero" and "hold".
        skip: what tokens that are not kept do without: "attention", or the whole "layer", which they pass on the
            residual stream as if it were not there (with "zero" only).
        skip_in: which layers `skip="layer"` is for: their numbers, or from which fraction of all layers on, below 1; in
            the others tokens that are not kept get what `unselected` says. None: all that select.
        prefill: "sparse" attends so; "dense" attends to all and compacts the cache only.
        dense_layers: layers that keep every token: how many of the first ones, which fraction of all layers from the
            first, below 1, or their numbers.
        score_every: a layer that selects does so for that many layers, itself among them; 0: for all that follow. A
            layer that selects nothing of its own needs no keys either of tokens that are not kept.
        groups: "layer" selects once per layer, "kv_head" for each KV head, the same number of tokens each. Then no
            projection is pruned, and where the cache holds latents, a layer selects once all the same.
    """

    recent_probes: int = 64
    random_probes: int = 64
    draw: Literal["random", "strided"] = "random"
    seed: int = 0
    score: Score = "normalised"
    pooling: int = 1
    tau: float = 0.975
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    floor: float = 0.0
    keep_recent: int = 1
    keep_first: int = 0
    unselected: Unselected = "zero"
    window: int = 64
    sinks: int = 4
    kept_window: bool = False
    skip: Skip = "attention"
    skip_in: float | tuple[int, ...] | None = None
    prefill: Literal["sparse", "dense"] = "sparse"
    dense_layers: int | float | tuple[int, ...] = 0
    score_every: int = 1
    groups: Literal["layer", "kv_head"] = "layer"

    @property
    def budget(self) -> Budget:
        """Return how many tokens to keep."""
        return Budget(self.tau, self.keep_ratio, self.keep_tokens, self.floor)

    @property
    def probes(self) -> int:
        """Return how many rows measure attention in a prompt that is longer than that (tokens)."""
        return self.recent_probes + self.random_probes

    @property
    def keeps_all(self) -> bool:
        """Return whether every token of any prompt is kept."""
        budget = self.budget
        fixed_part = budget.keep_ratio is not None or budget.keep_tokens is not None
        return budget.floor >= 1 or budget.keep_ratio == 1 or (budget.tau >= 1 and not fixed_part)

    @property
    def probe_seed(self) -> int:
        """Return what the operators take for the draw of probe rows."""
        return STRIDED if self.draw == "strided" else self.seed

    def of_layer(self, number: int) -> Self:
        """Return the rule of the layer of a number: who passes a layer gets no attention from it."""
        if self.skip == "attention":
            return self
        assert not isinstance(self.skip_in, float), "counted before"
        if self.skip_in is None or number in self.skip_in:
            return replace(self, unselected="zero", kept_window=False)
        return replace(self, skip="attention")

    @property
    def queries(self) -> str:
        """Return whose attention output the operators compute, that of the "selected" tokens or of "all"."""
        return "all" if self.unselected == "all" else "selected"

    @property
    def local(self) -> bool:
        """Return whether some tokens see their window and the sinks."""
        return self.unselected == "window" or (self.unselected == "all" and self.kept_window)
