"""The options of the backend: names, defaults, checks."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipvl_compile.dynamo import UserError
from zipvl_compile.option_checks import CHECKS, plain
from zipvl_compile.passes.policy import Policy
from zipvl_compile.passes.settings import Settings
from zipvl_compile.policies import policy
from zipvl_compile.policies.presets import DEFAULT, PRESETS

FIXED = ("keep_ratio", "keep_tokens")  # a floor does not hold beside one of these, unless it is given, too
BUDGETS = ("tau", *FIXED)


class OptionError(UserError):
    """An option of the zipvl backend that does not exist or has a bad value; a ValueError."""


@dataclass(frozen=True, kw_only=True)
class ZipVLOptions(Policy):
    """What `options=` of `torch.compile(model, backend="zipvl", options={...})` may hold.

    Attributes:
        calibration: file that `zipvl calibrate` wrote: its options, of which others given here change single ones.
        preset: a choice of everything below for those who do not want to choose, see `PRESETS`.
        policy: a selection rule, one of `zipvl_compile.policies`; other options change single fields of it.
        evict: what becomes of the other tokens of the KV cache: "drop" frees them; "host" moves them to host memory,
            from where later turns and re-selections call them back; "quantize" holds them at `evict_bits` bits, and
            decoding reads them, too; "keep" leaves the cache full.
        evict_bits: of each number of such tokens with "quantize": 8, 4 or 2.
        min_tokens: shorter prompts stay dense (tokens); None asks the cost model, for each attention, on this machine.
        reselect_tokens: from so many new tokens on a later part of a prompt, or a later turn, and what is in memory are
            selected anew, so that conversations have a bounded cache (tokens, at least 128); 0 drops nothing.
        reselect_every: after so many generated tokens, those in memory are selected anew, by the attention of the
            newest ones (tokens); 0 drops nothing while tokens are generated.
        inner: the compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
        kernel: implementation of the operators: "auto" (Triton on GPUs, the fastest per shape), "triton" or "torch".
        mode: Inductor's mode, as in `torch.compile(mode=...)`, for use together with `options`; for no other `inner`.
        the others: see `Policy`. At most one of `tau`, `keep_ratio` and `keep_tokens` may be given.
    """

    calibration: str | None = None
    preset: str | None = None
    policy: str | None = None
    evict: str = Settings.evict
    evict_bits: int = Settings.evict_bits
    min_tokens: int | None = None
    reselect_tokens: int = Settings.reselect_tokens
    reselect_every: int = Settings.reselect_every
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
        if parsed.reselect_every and parsed.evict == "drop" and parsed.keep_ratio is not None:
            raise OptionError(
                "zipvl option 'reselect_every': expected 'keep_tokens' or 'tau' beside it where tokens are dropped, "
                f"got keep_ratio={parsed.keep_ratio}: a fraction of what is left, again and again, leaves nothing. "
                "Give keep_tokens, or evict='host' or 'quantize', which lose no token."
            )
        if parsed.recent_probes + parsed.random_probes < 1:
            raise OptionError(
                "zipvl options 'recent_probes' and 'random_probes': expected at least one probe row together, got 0. "
                "Leave one of them at 64."
            )
        return parsed


def check_fits_static_cache(options: ZipVLOptions) -> None:
    """Check that a cache of fixed size can do what the options ask for.

    Raises:
        OptionError: it cannot: what it holds changes from time to time.
    """
    if options.evict in ("host", "quantize") or options.reselect_every:
        raise OptionError(
            "zipvl options 'evict' and 'reselect_every': expected evict='drop' or 'keep' and reselect_every=0 with a "
            f"static cache, got evict={options.evict!r} and reselect_every={options.reselect_every}. Leave "
            "cache_implementation='static' out, or these options."
        )


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
    return {name: plain(value) for name, value in given.items()}


def _check_one(name: Any, value: Any) -> None:
    if name not in CHECKS:
        names = [field.name for field in dataclasses.fields(ZipVLOptions)]
        close = difflib.get_close_matches(str(name), [*CHECKS], n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Remove it."
        raise OptionError(f"zipvl option {name!r}: expected one of {', '.join(names)}, got {name!r}. {hint}")
    holds, expected, remedy = CHECKS[name]
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
