"""`zipvl_compile.compile`: compile whatever the `generate` of a model runs step by step, in place.

Most models generate themselves. Others hand over to an inner model, by whatever way leads to it (BLIP-2, peft):

    def generate(self, pixel_values, input_ids, ...):
        ...
        return self.language_model.generate(...)

There `model.compile(...)` on the outer model compiles nothing that `generate` runs. What a `generate` runs shows only
when it runs, so every part of the model that can generate is compiled; that costs nothing until a part is called.
"""

from __future__ import annotations

import logging
import sys
import weakref
from types import FrameType
from typing import Any

import torch
from transformers import GenerationMixin

from zipvl_compile.attention_switch import check, switch
from zipvl_compile.dynamo import apart, backend_of_call, in_place_for_zipvl, is_wrapped_for_zipvl, original_of
from zipvl_compile.options import ZipVLOptions

log = logging.getLogger("zipvl_compile")
_checked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def compile(
    model: torch.nn.Module, *, path: str | None = None, attention: str | None = None, **options: Any
) -> list[str]:  # a verb, as torch.compile
    """Compile a Hugging Face model for zipvl, in place, so that its `generate` uses it.

    On a model that generates itself, this is `model.compile(backend="zipvl", options=options)`, with options that are
    checked at once and, since PyTorch 2.13, with compiled code of its own.

    Args:
        model: any Hugging Face model, or a module around one (peft, a wrapper): what can generate in it is compiled.
        path: of the one module to compile instead, such as "language_model"; "" is the model itself.
        attention: "sdpa" or "eager": the `attn_implementation` to set in all parts that have it; None leaves it.
        options: see `ZipVLOptions`.

    Returns:
        Paths of the modules that were compiled: `[""]` for the model itself, `["base_model.model"]` for a peft model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown option or a bad value, a path that leads nowhere, an attention that the decoder does not
            have, or a model with a `generate` of its own and nothing in it that is known to generate; nothing is
            compiled then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}. Pass a Hugging Face model.")
    ZipVLOptions.parse(options)
    check(attention)
    model = original_of(model)
    paths = generating_modules(model) if path is None else [path]
    parts = [_part(model, path) for path in paths]
    if attention is not None:
        switch(model, parts, attention)
    for part in parts:
        part.compile(backend="zipvl", options=options, **apart())
    for path in paths:
        log.info("zipvl compiles %s", f"{type(model).__name__}.{path}" if path else type(model).__name__)
    return paths


def generating_modules(model: torch.nn.Module) -> list[str]:
    """Return the paths of the modules that `model.generate` may run step by step; `[""]` is the model itself.

    Raises:
        ValueError: it has a `generate` of its own, and nothing in it is known to generate.
    """
    if not hasattr(model, "generate"):
        return [""]
    paths: list[str] = []
    inside: tuple[str, ...] = ()  # what a module that generates itself calls, it calls in its own forward
    for path, part in model.named_modules():
        if _can_generate(part) and not f"{path}.".startswith(inside):
            paths.append(path)
            if _generates_itself(part):
                inside += (f"{path}." if path else "",)
    if not paths:
        raise ValueError(
            f"path: expected where {type(model).__name__}.generate calls a model, since nothing in it is known as a "
            'Hugging Face model that generates, got none. Pass path="" if it calls itself, the path of the module that '
            'it calls, such as path="decoder", or compile that module itself.'
        )
    return paths


def _can_generate(part: torch.nn.Module) -> bool:
    return isinstance(part, GenerationMixin) and getattr(part, "can_generate", lambda: True)()


def _generates_itself(part: torch.nn.Module) -> bool:
    """Return whether its `generate` is that of Hugging Face, which calls the module itself."""
    return type(part).generate is GenerationMixin.generate and "generate" not in vars(part)  # type: ignore[attr-defined]


def _part(model: torch.nn.Module, path: str) -> torch.nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"path: expected a module of {type(model).__name__}, got {path!r}. "
            'Use one of the names of model.named_modules(), or "" for the model itself.'
        ) from None


def uncompiled_generate() -> str | None:
    """Return a warning if a `generate` runs a model that is not compiled, though it was asked of one that is.

    Called where a cache is filled outside of every graph; says it once for each model that runs.
    """
    models = _generating()
    if not models or models[0] in _checked or backend_of_call() is not None:
        return None
    runs = models[0]
    _checked.add(runs)
    if in_place_for_zipvl(runs):
        return None
    if is_wrapped_for_zipvl(runs):
        return (
            'torch.compile(model, backend="zipvl").generate(...) runs the original, uncompiled model: PyTorch forwards '
            'generate to it. Use model.compile(backend="zipvl") and then model.generate(...), which compiles in place.'
        )
    asked = next((model for model in models[1:] if in_place_for_zipvl(model) or is_wrapped_for_zipvl(model)), None)
    if asked is None:
        return None
    return (
        f"zipvl: {type(asked).__name__}.generate runs a {type(runs).__name__} that is not compiled; what was compiled "
        "is not what it calls. Use zipvl_compile.compile(model) in the place of model.compile(...), or its path=."
    )


def generates_for_zipvl() -> bool:
    """Return whether a `generate` is running whose model is compiled for zipvl, in place."""
    return any(in_place_for_zipvl(model) for model in _generating())


def length_asked_of_generate(made: int) -> int:
    """Return for how many tokens the `generate` that runs needs the static cache that it makes for `made` tokens.

    transformers makes it as long as the longest one before; a cache of other lengths, or of an encoder's tokens, which
    comes second, is as long as it has to be.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_prepare_static_cache":
        frame = frame.f_back
    if frame is None or "cache" in frame.f_locals or frame.f_locals.get("effective_length") != made:
        return made
    asked = frame.f_locals.get("max_cache_len")
    return min(asked, made) if isinstance(asked, int) else made


def _generating() -> list[torch.nn.Module]:
    """Return the modules whose `generate` is running, the innermost first."""
    found: list[torch.nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "generate" else None
        if isinstance(owner, torch.nn.Module) and owner not in found:
            found.append(owner)
        frame = frame.f_back
    return found
