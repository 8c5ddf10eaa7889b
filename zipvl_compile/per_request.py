"""Numbers of the budget that change from request to request: no graph is compiled anew for them.

    with zipvl_compile.settings(tau=0.9):
        model.generate(...)

A compiled prefill takes them as its last input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from zipvl_compile.kernels.budget import Budget
from zipvl_compile.options import BUDGETS, FIXED, OptionError, check

_asked: ContextVar[Mapping[str, Any]] = ContextVar("zipvl_settings", default={})  # noqa: B039  (nobody writes to it)
_selecting: ContextVar[frozenset[int] | None] = ContextVar("zipvl_selecting", default=None)


@contextlib.contextmanager
def settings(
    *,
    tau: float | None = None,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    floor: float | None = None,
) -> Iterator[None]:
    """Change how many tokens the prompts of this block keep, in this thread, without a new compile.

    Args:
        tau: fraction of the attention to keep, in (0, 1].
        keep_ratio: fixed fraction of tokens instead of it and of a floor, in (0, 1].
        keep_tokens: fixed number of tokens instead of it and of a floor, at least 1.
        floor: least fraction of tokens, in [0, 1].

    What is not given stays as the model was compiled, or as a block around this one says. A prompt that is dense, as
    one shorter than `min_tokens`, stays dense.

    Raises:
        OptionError: (a ValueError) a bad number, or two of `tau`, `keep_ratio` and `keep_tokens`; or, when a prompt
            comes, a model that was compiled to keep every token.
    """
    every = {"tau": tau, "keep_ratio": keep_ratio, "keep_tokens": keep_tokens, "floor": floor}
    given = check({name: value for name, value in every.items() if value is not None})
    token = _asked.set(_merged(_asked.get(), given))
    try:
        yield
    finally:
        _asked.reset(token)


def _merged(numbers: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers of which others were given: one of `BUDGETS` replaces another, a fixed one a floor besides."""
    replaced = BUDGETS if any(name in given for name in BUDGETS) else ()
    replaced = (*replaced, "floor") if any(name in given for name in FIXED) else replaced
    return {name: value for name, value in numbers.items() if name not in replaced} | dict(given)


@contextlib.contextmanager
def only_in(layers: Collection[int]) -> Iterator[None]:
    """Let the layers of these numbers select, and all others keep every token, in the prompts of this block."""
    token = _selecting.set(frozenset(layers))
    try:
        yield
    finally:
        _selecting.reset(token)


def budget_of_call(compiled: Budget, layers: tuple[int, ...]) -> torch.Tensor:
    """Return the numbers that a call of a graph uses, as the graph takes them: float64 `[layers, 4]`.

    Args:
        compiled: what the graph was compiled for.
        layers: the numbers of its layers.
    """
    own = {name: value for name, value in dataclasses.asdict(compiled).items() if value is not None}
    budget = Budget(**_merged(own, _asked.get()))
    selecting = _selecting.get()
    return _numbers(budget, tuple(selecting is None or layer in selecting for layer in layers))


@functools.lru_cache(maxsize=256)
def _numbers(budget: Budget, selects: tuple[bool, ...]) -> torch.Tensor:
    every = Budget(tau=1.0)
    return torch.stack([(budget if one else every).as_tensor() for one in selects])


def check_can_change() -> None:
    """Check that nothing is asked of a graph that keeps every token.

    Raises:
        OptionError: numbers are asked for.
    """
    if asked := _asked.get():
        got = ", ".join(f"{name}={value}" for name, value in asked.items())
        raise OptionError(
            f"zipvl_compile.settings: expected a model that was compiled to drop tokens, got {got} for one that was "
            "compiled to keep every token. Compile it with another tau."
        )
