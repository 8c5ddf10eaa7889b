"""What Dynamo is doing right now: which backend it traces for, and whether gradients matter.

Dynamo has no public call for either, so its internals are read here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.symbolic_convert import InstructionTranslator


def _translator() -> Any:
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # nothing is being traced on this thread
        return None


def _module_in_training(translator: Any) -> bool:
    """Return whether the traced frame belongs to a module in training mode, or to no module that can tell."""
    for value in translator.output.root_tx.f_locals.values():
        if isinstance(value, torch.nn.Module):
            return value.training
    return True


def gradients_matter() -> bool:
    """Return whether the traced call may be differentiated: gradients are on and the module is in training mode.

    A module in eval mode runs without gradients even where the caller forgot `torch.no_grad()`, as in most manual
    generation loops.
    """
    translator = _translator()
    return torch.is_grad_enabled() and (translator is None or _module_in_training(translator))


@torch._dynamo.assume_constant_result
def tracing_for_zipvl() -> bool:
    """Return whether Dynamo traces the current frame for this backend, for inference.

    Read by the cache layers while they are traced; a constant of the compiled code, which Dynamo keeps per backend.
    """
    from zipvl_compile.backend import zipvl

    translator = _translator()
    if translator is None:
        return False
    backend = innermost_backend(translator.output.compiler_fn)
    return getattr(backend, "compiler_fn", backend) is zipvl and not gradients_matter()
