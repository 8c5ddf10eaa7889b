"""The options of the backend: names, defaults, checks."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

from zipvl_compile.dynamo import UserError, inductor_modes
from zipvl_compile.passes.match.attention_site import PART_TOKENS
from zipvl_compile.passes.policy import Policy, Score, Skip, Unselected
from zipvl_compile.passes.settings import Settings
from zipvl_compile.policies import names as policy_names
from zipvl_compile.policies import policy
from zipvl_compile.policies.presets import DEFAULT, PRESETS

FIXED = ("keep_ratio", "keep_tokens")  # a floor does not hold beside one of these, unless it is given, too
BUDGETS = ("tau", *FIXED)


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
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return tuple(map(_plain, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class ZipVLOptions(Policy):
    """What `options=` of `torch.compile(model, backend="zipvl", options={...})` may hold.

    Attributes:
        calibration: file that `zipvl calibrate` wrote: its options, of which others given here change single ones.
        preset: a choice of everything below for those who do not want to choose, see `PRESETS`.
        policy: a selection rule, one of `zipvl_compile.policies`; other options change single fields of it.
        evict: "drop" frees the other tokens of the KV cache; "keep" leaves the cache full.
        min_tokens: shorter prompts stay dense (tokens); None asks the cost model, for each attention, on this machine.
        reselect_tokens: from so many new tokens on a later part of a prompt, or a later turn, and what is in memory are
            selected anew, so that conversations have a bounded cache (tokens, at least 128); 0 drops nothing.
        inner: the compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
        kernel: implementation of the operators: "auto" (Triton on GPUs, the fastest per shape), "triton" or "torch".
        mode: Inductor's mode, as in `torch.compile(mode=...)`, for use together with `options`; for no other `inner`.
        the others: see `Policy`. At most one of `tau`, `keep_ratio` and `keep_tokens` may be given.
    """

    calibration: str | None = None
    preset: str | None = None
    policy: str | None = None
    evict: str = Settings.evict
    min_tokens: int | None = None
    reselect_tokens: int = Settings.reselect_tokens
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
        given = check(dict(options or {}) | ({} if mode is None else {"mode": mode}))
        if given.get("calibration") is not None:
            given = _with_calibration(given)
        if given.pop("queries", None) == "all":
            given.setdefault("unselected", "all")
        parsed = cls(**_chosen(given) | given)
        if given.get("kept_window") and parsed.unselected in ("zero", "hold"):
            raise OptionError(
                "zipvl option 'kept_window': expected unselected='window' or 'all' beside it, which have a window, got "
                f"unselected={parsed.unselected!r}. Leave it out, or choose policy='union'."
            )
        local = parsed.skip_in is None and parsed.unselected != "zero"
        if parsed.skip == "layer" and (local or parsed.prefill != "sparse"):
            raise OptionError(
                "zipvl option 'skip': expected unselected='zero' and prefill='sparse' beside skip='layer', since a "
                f"token that passes a layer gets no attention, got unselected={parsed.unselected!r} and "
                f"prefill={parsed.prefill!r}. Choose policy='skip_layers', name the layers by skip_in=[...], or leave "
                "'skip' out."
            )
        if parsed.skip_in is not None and parsed.skip != "layer":
            raise OptionError(
                f"zipvl option 'skip_in': expected skip='layer' beside it, whose layers it names, got skip="
                f"{parsed.skip!r}. Give both, or neither."
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


def _with_calibration(given: dict[str, Any]) -> dict[str, Any]:
    """Return options, and those of the calibration file that they do not change."""
    path = given["calibration"]
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["options"]
        found = check({name: value for name, value in found.items() if name != "calibration"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"zipvl option 'calibration': expected a file that `zipvl calibrate` wrote, got {path!r} ({error}). "
            "Write it anew."
        ) from error
    if any(given.get(name) is not None for name in BUDGETS):
        found = {name: value for name, value in found.items() if name not in BUDGETS}
    if given.get("policy") is not None or given.get("preset") is not None:
        found = {name: value for name, value in found.items() if name not in ("policy", "preset")}
    return found | given


def check(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with plain numbers.

    Raises:
        OptionError: one that does not exist, has a bad value, or excludes another.
    """
    for name, value in given.items():
        _check_one(name, value)
    _check_together(given)
    return {name: _plain(value) for name, value in given.items()}


def _check_one(name: Any, value: Any) -> None:
    if name not in _CHECKS:
        names = [field.name for field in dataclasses.fields(ZipVLOptions)]
        close = difflib.get_close_matches(str(name), [*_CHECKS], n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Remove it."
        raise OptionError(f"zipvl option {name!r}: expected one of {', '.join(names)}, got {name!r}. {hint}")
    holds, expected, remedy = _CHECKS[name]
    if not holds(value):
        raise OptionError(f"zipvl option {name!r}: expected {expected}, got {value!r}. {remedy}")


def _check_together(given: Mapping[str, Any]) -> None:
    asked = {name: given[name] for name in BUDGETS if given.get(name) is not None}
    if len(asked) > 1:
        names = " and ".join(repr(name) for name in asked)
        got = " and ".join(f"{name}={value}" for name, value in asked.items())
        raise OptionError(
            f"zipvl options {names}: expected one of them, got {got}. Give 'tau' to let each layer choose how much it "
            "keeps, 'keep_ratio' for a fixed fraction, 'keep_tokens' for a fixed number."
        )
    if given.get("preset") is not None and given.get("policy") is not None:
        raise OptionError(
            f"zipvl options 'preset' and 'policy': expected one of them, got preset={given['preset']!r} and "
            f"policy={given['policy']!r}. A preset names a policy; give single options beside it to change it."
        )


def _chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the rule that is asked for, as far as a budget that is given does not replace its own."""
    preset = {} if given.get("policy") else PRESETS[given.get("preset") or DEFAULT]
    rule = policy(given.get("policy") or preset.get("policy", "paper"))
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    fields |= _other_budgets(preset) | {name: value for name, value in preset.items() if name != "policy"}
    return fields | _other_budgets(given)


def _other_budgets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the numbers of a budget are once another one of them is given; a fixed number has no floor."""
    none = {"tau": Policy.tau, "keep_ratio": None, "keep_tokens": None}
    fixed = {"floor": Policy.floor} if any(given.get(name) is not None for name in FIXED) else {}
    return none | fixed if any(given.get(name) is not None for name in BUDGETS) else {}


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
_CHECKS: dict[str, _Check] = {
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
    "evict": _words("drop", "keep", remedy='Use "keep" for a full KV cache.'),
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
    "inner": _words("inductor", "aot_eager", "eager", remedy='Use "inductor" for speed.'),
    "kernel": _words("auto", "triton", "torch", remedy='Use "auto" for speed.'),
    "mode": (_is_mode, "None or a mode of torch.compile", 'Use "default", "reduce-overhead" or "max-autotune".'),
}
