"""The compilers that take the rewritten graphs: Inductor and AOTAutograd, by private names of PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

CHECKS_MAY_FAIL = torch.__version__ < "2.13"
UNCHECKED = (
    f"zipvl: PyTorch {torch.__version__} writes checks of indices into its code for CPUs that do not compile, with "
    "zipvl or without it (github.com/pytorch/pytorch/issues/187335). A graph is compiled without them: a token id "
    "outside of the vocabulary is not caught there. PyTorch 2.13 has no such fault."
)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Return the modes of `torch.compile`, each with the settings of Inductor that it stands for."""
    from torch._inductor import list_mode_options  # takes a second, and only `inner="inductor"` needs it

    return list_mode_options()


def compile_with_inductor(
    gm: GraphModule, example_inputs: list[Any], mode: str | None, records: bool = True
) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor; a mode is one of `inductor_modes()`, `records`: also into CUDA graphs."""
    from torch._inductor.compile_fx import compile_fx  # as above
    from torch._inductor.exc import CppCompileError, InductorError

    patches = {} if mode is None else inductor_modes()[mode] | ({} if records else {"triton.cudagraphs": False})
    try:
        return compile_fx(gm, example_inputs, config_patches=patches or None)  # type: ignore[return-value]
    except (CppCompileError, InductorError) as error:
        if not (CHECKS_MAY_FAIL and isinstance(getattr(error, "inner_exception", error), CppCompileError)):
            raise
    compiled = compile_fx(gm, example_inputs, config_patches=patches | {"assert_indirect_indexing": False})
    warnings.warn(UNCHECKED, stacklevel=2)
    return compiled  # type: ignore[return-value]


def compile_with_aot_eager(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Send a Dynamo graph through AOTAutograd, and run what comes out of it operator by operator."""
    return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)
