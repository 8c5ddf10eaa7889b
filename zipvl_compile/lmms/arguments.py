"""Which of `--model_args` are options of zipvl, which the plugin's own, and which those of lmms-eval's model."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zipvl_compile.option_checks import CHECKS
from zipvl_compile.options import ZipVLOptions

OWN = ("base", "backend")


@dataclass(frozen=True)
class Arguments:
    """What `--model_args` say.

    Attributes:
        base: name of lmms-eval's model; None chooses it by the configuration.
        backend: "zipvl", another backend of `torch.compile` to compare with, or "none", which compiles nothing.
        options: of zipvl.
        others: of lmms-eval's model.
    """

    base: str | None
    backend: str
    options: dict[str, Any]
    others: dict[str, Any]


def split(given: Mapping[str, Any]) -> Arguments:
    """Sort arguments by whom they are for; the values of options are checked at once.

    Args:
        given: as lmms-eval parses `--model_args`: numbers and flags, all else texts. Lists are JSON.

    Raises:
        ValueError: a bad option or backend, or options beside another backend than zipvl.
    """
    options = {name: _value(value) for name, value in given.items() if name in CHECKS}
    others = {name: value for name, value in given.items() if name not in CHECKS and name not in OWN}
    backend = given.get("backend", "zipvl")
    known = ["none", *torch.compiler.list_backends()]
    if backend not in known:
        raise ValueError(
            f"model_args 'backend': expected one of {', '.join(known)}, got {backend!r}. Leave it out for zipvl."
        )
    if options and backend != "zipvl":
        raise ValueError(
            f"model_args {', '.join(options)}: expected backend=zipvl beside options of it, got backend={backend}. "
            "Leave one of them out."
        )
    ZipVLOptions.parse(options)
    return Arguments(given.get("base"), backend, options, others)


def _value(text: Any) -> Any:
    """Return what a text means for an option: None, a list or the text itself."""
    if not isinstance(text, str):
        return text
    text = text.strip("'\"")
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return None if text in ("None", "null") else text


def parameters(base: type) -> dict[str, Any]:
    """Return the arguments that a class, or one that it inherits from, is made with: name -> default."""
    found: dict[str, Any] = {}
    for one in reversed(base.__mro__):
        init = vars(one).get("__init__")
        for name, parameter in inspect.signature(init).parameters.items() if inspect.isfunction(init) else ():
            if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found[name] = parameter.default
    return found


def check_known(others: Iterable[str], base: str, known: Iterable[str]) -> None:
    """Check that there is nobody's argument among those for lmms-eval's model.

    Args:
        others: names of the arguments for it.
        base: its name.
        known: names of the arguments that it takes.

    Raises:
        ValueError: names the argument, and those with close names.
    """
    known = list(known)
    for name in others:
        if name in known:
            continue
        close = difflib.get_close_matches(name, [*known, *CHECKS, *OWN], n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "Remove it."
        raise ValueError(
            f"model_args: expected an option of zipvl, {' or '.join(map(repr, OWN))}, or an argument of lmms-eval's "
            f"{base} ({', '.join(known)}), got {name!r}. {hint}"
        )


def with_device_map(others: Mapping[str, Any], known: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Return arguments with the `device_map` that a model of lmms-eval needs and does not choose by itself.

    The default of some, "", is an error of transformers 5; with that of others, "auto", inputs go to CUDA, whatever the
    device is.

    Args:
        others: arguments of the model.
        known: those that it takes, with their defaults.
        processes: several of them place their models themselves.
    """
    device, chosen = others.get("device") or known.get("device"), known.get("device_map")
    needed = chosen == "" or (chosen == "auto" and device == "cpu")
    return dict(others) if processes > 1 or "device_map" in others or not needed else {**others, "device_map": device}
