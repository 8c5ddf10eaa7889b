"""What each option of the backend may be: a test, what it expects in words, and what to do otherwise."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, get_args

from zipvl_compile.inner_compilers import inductor_modes
from zipvl_compile.passes.match.attention_site import PART_TOKENS
from zipvl_compile.passes.policy import Score, Skip, Unselected
from zipvl_compile.policies import names as policy_names
from zipvl_compile.policies.presets import PRESETS


def _fraction(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _count(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def plain(value: Any) -> Any:
    """Return NumPy's numbers, and others that are none of Python's own, as Python's."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return tuple(map(plain, value)) if isinstance(value, list) else value


def _is_mode(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in inductor_modes())


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _least_fraction(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _odd(value: Any) -> bool:
    return _count(1)(value) and int(value) % 2 == 1


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _spelled(values: Iterable[str]) -> str:
    *first, last = [f'"{value}"' for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def _words(*values: str, remedy: str, none: bool = False) -> _Check:
    holds = _one_of(*values)
    return (_or_none(holds), f"None, {_spelled(values)}", remedy) if none else (holds, _spelled(values), remedy)


_Check = tuple[Callable[[Any], bool], str, str]
_TOKENS = "an integer of at least 0"
_PAPERS = "Use 64 for the paper's setting."
CHECKS: dict[str, _Check] = {
    "calibration": (
        lambda value: value is None or (isinstance(value, (str, os.PathLike)) and str(value) != ""),
        "None or the path of a file",
        "Write one with `zipvl calibrate`.",
    ),
    "preset": _words(*PRESETS, remedy="Leave it out for the default.", none=True),
    "policy": _words(*policy_names(), remedy="Leave it out for the default.", none=True),
    "tau": (_fraction, "a fraction in (0, 1]", "Use 1.0 to keep every token, 0.975 for the paper's setting."),
    "keep_ratio": (_or_none(_fraction), "None or a fraction in (0, 1]", "Use None to let tau decide."),
    "keep_tokens": (_or_none(_count(1)), "None or an integer of at least 1", "Use None to let tau decide."),
    "floor": (_least_fraction, "a fraction in [0, 1]", "Use 0 for no floor."),
    "recent_probes": (_count(0), _TOKENS, _PAPERS),
    "random_probes": (_count(0), _TOKENS, _PAPERS),
    "draw": _words("random", "strided", remedy='Use "random" for the paper\'s setting.'),
    "seed": (lambda value: _count(0)(value) and value < 2**63, "an integer in [0, 2**63)", "Use 0."),
    "score": _words(*get_args(Score), remedy='Use "normalised" for the paper\'s setting.'),
    "pooling": (_odd, "an odd integer of at least 1", "Use 1 for none."),
    "keep_recent": (_count(1), "an integer of at least 1", "The newest token must be kept; use 1."),
    "keep_first": (_count(0), _TOKENS, "Use 0 to protect none."),
    "unselected": _words(*get_args(Unselected), remedy='Use "zero" for the paper\'s method.'),
    "window": (_count(1), "an integer of at least 1", "Use 64; a token sees at least itself."),
    "sinks": (_count(0), _TOKENS, "Use 4."),
    "kept_window": (_flag, "True or False", "Use False to let kept tokens see kept tokens only."),
    "queries": _words("selected", "all", remedy='It is unselected="zero" or unselected="all" now.'),
    "skip": _words(*get_args(Skip), remedy='Use "attention" for the paper\'s method.'),
    "skip_in": (
        lambda value: (
            all(map(_count(0), value))
            if isinstance(value, (list, tuple))
            else value is None or (_number(value) and 0 < value < 1)
        ),
        "None, a fraction in (0, 1), or a list of layer numbers",
        "Use None for every layer that selects.",
    ),
    "prefill": _words("sparse", "dense", remedy='Use "dense" to compact the cache only.'),
    "dense_layers": (
        lambda value: (
            all(map(_count(0), value))
            if isinstance(value, (list, tuple))
            else _count(0)(value) or (_number(value) and 0 < value < 1)
        ),
        "an integer of at least 0, a fraction in (0, 1), or a list of layer numbers",
        "Use 0 to let every layer select.",
    ),
    "score_every": (_count(0), "an integer of at least 0", "Use 1 to let every layer select."),
    "groups": _words("layer", "kv_head", remedy='Use "layer" for one selection per layer.'),
    "evict": _words("drop", "host", "quantize", "keep", remedy='Use "keep" for a full KV cache.'),
    "evict_bits": (lambda value: _count(2)(value) and value in (2, 4, 8), "2, 4 or 8", "Use 4."),
    "min_tokens": (
        _or_none(_count(0)),
        "None or an integer of at least 0",
        "Use 0 to rewrite prompts of every length, None to let the cost model decide.",
    ),
    "reselect_tokens": (
        lambda value: _count(PART_TOKENS)(value) or (_count(0)(value) and value == 0),
        f"0 or an integer of at least {PART_TOKENS}",
        "Use 0 to drop nothing after the first part of a prompt.",
    ),
    "reselect_every": (_count(0), _TOKENS, "Use 0 to drop nothing while tokens are generated."),
    "inner": _words("inductor", "aot_eager", "eager", remedy='Use "inductor" for speed.'),
    "kernel": _words("auto", "triton", "torch", remedy='Use "auto" for speed.'),
    "mode": (_is_mode, "None or a mode of torch.compile", 'Use "default", "reduce-overhead" or "max-autotune".'),
}
