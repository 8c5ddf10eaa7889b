"""A model as a variant wants it: dense and not compiled, or rewritten by zipvl and run in eager mode.

Variants that differ only in how many tokens they keep share one trace, which takes longer than a dozen documents do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from zipvl_compile.demo.compare import compiled_copy
from zipvl_compile.evaluate.variants import Options
from zipvl_compile.kernels.budget import Budget
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.per_request import settings

#: So that prompts of every length are compacted, and continuations, which are measured, are not.
ALWAYS: dict[str, Any] = {"min_tokens": 0, "reselect_tokens": 0}


def compiled_for(model: Any, options: Options, dynamic: bool | None = True) -> Any:
    """Return a compiled copy of a model with the same weights; nothing but the trace is compiled.

    Args:
        model: stays as it is; what was compiled before is forgotten.
        options: of the backend.
        dynamic: True traces once for prompts of every length; None for those of one length, in 0.6 of the time.
    """
    torch.compiler.reset()
    return compiled_copy(model, {**ALWAYS, **options}, "eager", dynamic=dynamic)


class Compiled:
    """A model, and the last copy of it that was compiled."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._rule: Any = None
        self._copy: Any = None

    @contextlib.contextmanager
    def as_variant(self, options: Options, dynamic: bool | None = True) -> Iterator[tuple[Any, bool]]:
        """Give the model itself where there are no options, else a compiled copy with the same weights.

        Args:
            options: of the backend.
            dynamic: see `compiled_for`.

        Yields:
            The model, and whether it has to be traced before it is measured.
        """
        if not options:
            yield self.model, False
            return
        parsed = ZipVLOptions.parse({**ALWAYS, **options})
        rule, numbers = _rule_of(parsed), _numbers_of(parsed.budget)
        new = rule is None or (rule, dynamic) != self._rule
        if new:
            self._copy = compiled_for(self.model, options, dynamic)
            self._rule = (rule, dynamic)
        with settings(**({} if rule is None else numbers)):
            yield self._copy, new


def _rule_of(options: ZipVLOptions) -> ZipVLOptions | None:
    """Return options without the numbers of their budget; None where every token is kept: a rule of its own."""
    if options.keeps_all:
        return None
    usual = Budget()
    return dataclasses.replace(
        options, preset=None, policy=None, tau=usual.tau, keep_ratio=None, keep_tokens=None, floor=usual.floor
    )


def _numbers_of(budget: Budget) -> dict[str, Any]:
    """Return what `settings` takes for a budget."""
    if budget.keep_tokens is not None:
        return {"keep_tokens": budget.keep_tokens, "floor": budget.floor}
    if budget.keep_ratio is not None:
        return {"keep_ratio": budget.keep_ratio, "floor": budget.floor}
    return {"tau": budget.tau, "floor": budget.floor}
