"""The options of the backend: names, defaults, checks."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from zipvl_compile.dynamo import UserError, inductor_modes
from zipvl_compile.passes.settings import Settings


class OptionError(UserError):
    """An option of the zipvl backend that does not exist or has a bad value; a ValueError."""


def _fraction(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _count(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _plain(value: Any) -> Any:
    """Return NumPy's numbers, and others that are none of Python's own, as Python's."""
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


@dataclass(frozen=True)
class ZipVLOptions:
    """What `options=` of `torch.compile(model, backend="zipvl", options={...})` may hold.

    Attributes:
        tau: fraction of the accumulated attention score that a layer keeps, in (0, 1]; 1.0 keeps every token.
        keep_ratio: fixed fraction of tokens to keep, in (0, 1]; None where `tau` decides. Nobody gives both.
        recent_probes: newest rows that measure attention (tokens).
        random_probes: rows drawn from the rest (tokens).
        seed: of that draw.
        keep_recent: newest tokens that are always kept.
        queries: "selected" gives attention output to kept tokens only (the paper), "all" to every token.
        groups: "layer" selects once per layer (the paper); "kv_head" is not available yet.
        evict: "drop" frees the other tokens of the KV cache; "keep" leaves the cache full.
        min_tokens: shorter prompts stay dense (tokens); None asks the cost model, for each attention, on this machine.
        inner: the compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
        kernel: implementation of the operators: "auto" (Triton on GPUs, the fastest per shape), "triton" or "torch".
        mode: Inductor's mode, as in `torch.compile(mode=...)`, for use together with `options`; for no other `inner`.

    Source: ZipVL (arXiv 2410.08584) for the defaults of `tau` and of the probes.
    """

    tau: float = Settings.tau
    keep_ratio: float | None = Settings.keep_ratio
    recent_probes: int = Settings.recent_probes
    random_probes: int = Settings.random_probes
    seed: int = Settings.seed
    keep_recent: int = Settings.keep_recent
    queries: str = Settings.queries
    groups: str = "layer"
    evict: str = Settings.evict
    min_tokens: int | None = None
    inner: str = "inductor"
    kernel: str = Settings.kernel
    mode: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> ZipVLOptions:
        """Check user options.

        Args:
            options: what the user passed as `options=`, or None.
            mode: what the user passed as `mode=`, or None.

        Raises:
            OptionError: (a ValueError) names the option, what was expected, what came, and what to do.
        """
        given = dict(options or {})
        if mode is not None:
            given["mode"] = mode
        names = [field.name for field in dataclasses.fields(cls)]
        for name, value in given.items():
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else "Remove it."
                raise OptionError(f"zipvl option {name!r}: expected one of {', '.join(names)}, got {name!r}. {hint}")
            holds, expected, remedy = _CHECKS[name]
            if not holds(value):
                raise OptionError(f"zipvl option {name!r}: expected {expected}, got {value!r}. {remedy}")
            given[name] = _plain(value)
        parsed = cls(**given)
        if "tau" in given and parsed.keep_ratio is not None:
            raise OptionError(
                f"zipvl options 'tau' and 'keep_ratio': expected one of them, got tau={parsed.tau} and "
                f"keep_ratio={parsed.keep_ratio}. Give 'tau' to let each layer choose how much it keeps, 'keep_ratio' "
                "for a fixed fraction."
            )
        if parsed.mode is not None and parsed.inner != "inductor":
            raise OptionError(
                f"zipvl option 'mode': expected inner='inductor', whose mode it is, got mode={parsed.mode!r} and "
                f"inner={parsed.inner!r}. Leave one of them out."
            )
        if parsed.recent_probes + parsed.random_probes < 1:
            raise OptionError(
                "zipvl options 'recent_probes' and 'random_probes': expected at least one probe row together, got 0. "
                "Leave one of them at 64."
            )
        return parsed


def _is_mode(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in inductor_modes())


_NOT_YET = "It is not available yet; leave the option out."
_CHECKS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "tau": (_fraction, "a fraction in (0, 1]", "Use 1.0 to keep every token, 0.975 for the paper's setting."),
    "keep_ratio": (
        lambda value: value is None or _fraction(value),
        "None or a fraction in (0, 1]",
        "Use None to let tau decide.",
    ),
    "recent_probes": (_count(0), "an integer of at least 0", "Use 64 for the paper's setting."),
    "random_probes": (_count(0), "an integer of at least 0", "Use 64 for the paper's setting."),
    "seed": (lambda value: _count(0)(value) and value < 2**63, "an integer in [0, 2**63)", "Use 0."),
    "keep_recent": (_count(1), "an integer of at least 1", "The newest token must be kept; use 1."),
    "queries": (_one_of("selected", "all"), '"selected" or "all"', 'Use "selected" for the paper\'s method.'),
    "groups": (_one_of("layer"), '"layer"', 'A selection per "kv_head": ' + _NOT_YET.lower()),
    "evict": (_one_of("drop", "keep"), '"drop" or "keep"', 'Use "keep" for a full KV cache.'),
    "min_tokens": (
        lambda value: value is None or _count(0)(value),
        "None or an integer of at least 0",
        "Use 0 to rewrite prompts of every length, None to let the cost model decide.",
    ),
    "inner": (
        _one_of("inductor", "aot_eager", "eager"),
        '"inductor", "aot_eager" or "eager"',
        'Use "inductor" for speed.',
    ),
    "kernel": (_one_of("auto", "triton", "torch"), '"auto", "triton" or "torch"', 'Use "auto" for speed.'),
    "mode": (_is_mode, "None or a mode of torch.compile", 'Use "default", "reduce-overhead" or "max-autotune".'),
}
