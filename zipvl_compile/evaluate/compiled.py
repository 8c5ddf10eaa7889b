"""A model as a variant wants it: dense and not compiled, or rewritten by zipvl and run in eager mode."""

from __future__ import annotations

from typing import Any

import torch

from zipvl_compile.demo.compare import compiled_copy
from zipvl_compile.evaluate.variants import Options

#: So that prompts of every length are compacted.
ALWAYS: dict[str, Any] = {"min_tokens": 0}


def compiled_for(model: Any, options: Options, dynamic: bool | None = True) -> Any:
    """Return the model itself where there are no options, else a compiled copy with the same weights.

    Nothing but the trace is compiled; what was compiled for others is forgotten.

    Args:
        model: stays as it is.
        options: of the backend.
        dynamic: True traces once for prompts of every length; None for those of one length, in 0.6 of the time.
    """
    if not options:
        return model
    torch.compiler.reset()
    return compiled_copy(model, {**ALWAYS, **options}, "eager", dynamic=True)
