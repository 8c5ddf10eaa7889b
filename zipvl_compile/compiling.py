"""`zipvl_compile.compile`: compile the module whose `generate` does the work, in place.

Most models generate themselves. Some hand over to an inner model (BLIP-2, InstructBLIP, Kosmos-2):

    def generate(self, pixel_values, input_ids, ...):
        ...
        return self.language_model.generate(...)

There `model.compile(...)` on the outer model compiles nothing that `generate` runs.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from typing import Any

import torch

from zipvl_compile.dynamo import original_of
from zipvl_compile.options import ZipVLOptions

log = logging.getLogger("zipvl_compile")


def compile(model: torch.nn.Module, **options: Any) -> list[str]:  # a library's verb, as torch.compile
    """Compile a Hugging Face model for zipvl, in place, so that its `generate` uses it.

    On a model that generates itself, this is `model.compile(backend="zipvl", options=options)`.

    Args:
        model: any Hugging Face model; of one that hands over to inner models, those are compiled.
        options: see `ZipVLOptions`.

    Returns:
        Paths of the modules that were compiled: `[""]` for the model itself, `["language_model"]` for BLIP-2.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown option or a bad value; nothing is compiled then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}. Pass a Hugging Face model.")
    ZipVLOptions.parse(options)
    model = original_of(model)
    paths = generating_modules(model)
    for path in paths:
        model.get_submodule(path).compile(backend="zipvl", options=options)
        log.info("zipvl compiles %s", f"{type(model).__name__}.{path}" if path else type(model).__name__)
    return paths


def generating_modules(model: torch.nn.Module) -> list[str]:
    """Return the paths of the modules that `model.generate` runs step by step; `[""]` is the model itself."""
    paths = []
    for name in _handed_over_to(type(model)):
        inner = getattr(model, name, None)
        if isinstance(inner, torch.nn.Module) and hasattr(inner, "generate"):
            # An inner model may hand over in its turn.
            paths += [f"{name}.{path}".rstrip(".") for path in generating_modules(inner)]
    return paths or [""]


def _handed_over_to(kind: type) -> list[str]:
    """Return the attributes `x` for which the `generate` of a class calls `self.x.generate(...)`, in order."""
    generate = getattr(kind, "generate", None)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(generate))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):  # no `generate`, or no source: a model that generates itself
        return []
    names = []
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr == "generate" and isinstance(called.value, ast.Attribute):
            owner = called.value
            if isinstance(owner.value, ast.Name) and owner.value.id == "self" and owner.attr not in names:
                names.append(owner.attr)
    return names
