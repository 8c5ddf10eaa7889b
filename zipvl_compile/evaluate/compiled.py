"""A model as a variant wants it: dense and not compiled, or rewritten by zipvl and run in eager mode."""

from __future__ import annotations

from typing import Any

import torch

from zipvl_compile.demo.compare import compiled_copy
from zipvl_compile.evaluate.variants import Options

#: So that prompts of every length are compacted.
ALWAYS: dict[str, Any] = {"min_tokens": 0}


def compiled_for(model: Any, options: Options) -> Any:
    """Return the model itself where there are no options, else a compiled copy with the same weights.

    Nothing but the trace is compiled, once for prompts of every length; what was compiled for others is forgotten.
    """
    if not options:
        return model
    torch.compiler.reset()
    return compiled_copy(model, {**ALWAYS, **options}, "eager", dynamic=True)
