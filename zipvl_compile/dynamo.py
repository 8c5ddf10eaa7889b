"""Every private name of PyTorch that this package needs, each behind a function that says what it is for.

PyTorch has no public call for most of what a backend must know: for whom Dynamo traces, whether gradients matter, what
stands behind a compiled model. Nothing of this package is imported here, so that all of it may import this.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard, TracingContext, detect_fake_mode
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])

#: Loggers that warn about graph breaks and data-dependent sizes while Dynamo traces.
TRACING_LOGGERS = ("torch._dynamo.variables.tensor", "torch._subclasses.fake_tensor")


class UserError(ShortenTraceback, ValueError):
    """A ValueError that reaches the user as it is.

    Dynamo wraps whatever a backend raises in BackendCompilerFailed, but for its own short-traceback errors.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


# ---- Which backend is ours


def zipvl_backend(backend: F) -> F:
    """Mark a backend function as zipvl's, for `is_zipvl`."""
    backend.is_zipvl = True  # type: ignore[attr-defined]
    return backend


def is_zipvl(backend: Any) -> bool:
    """Return whether a backend is zipvl's, seen through what Dynamo, torch.compile and `partial` wrap around it."""
    if not callable(backend):
        return False
    backend = innermost_backend(backend)
    backend = getattr(backend, "compiler_fn", backend)
    while isinstance(backend, functools.partial):
        backend = backend.func
    return getattr(backend, "is_zipvl", False) is True


# ---- What Dynamo is doing right now


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
    translator = _translator()
    return translator is not None and is_zipvl(translator.output.compiler_fn) and not gradients_matter()


def recompile_unless(holds: Callable[[], bool], text: str) -> bool:
    """Have Dynamo compile the traced frame again wherever `holds()` is false when it is called.

    Args:
        holds: runs with every guard of the frame, on the stack of its caller.
        text: what a recompile is reported with.

    Returns:
        Whether Dynamo will ask; False where nothing is being traced.
    """
    context = TracingContext.try_get()
    if context is None:
        return False

    def check(builder: Any, guard: Guard) -> None:
        manager = builder.guard_manager.root
        try:
            manager.add_lambda_guard(lambda _: holds(), [text], guard.user_stack)
        except TypeError:  # before PyTorch 2.13
            manager.add_lambda_guard(lambda _: holds(), [text])

    context.guards_context.dynamo_guards.add(Guard(GlobalStateSource(), check))
    return True


def raise_recompile_limit(least: int) -> None:
    """Let every code object be compiled `least` times before Dynamo runs it in eager mode instead."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, least)


# ---- Compiled models


def original_of(model: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled_in_place(model: torch.nn.Module) -> bool:
    """Return whether `model.compile(...)` was called."""
    return model._compiled_call_impl is not None


def is_wrapped_for_zipvl(model: torch.nn.Module) -> bool:
    """Return whether some `torch.compile(model, backend="zipvl")` wraps the module.

    Nothing leads from a module to its wrapper, so this looks through all live objects: not for every call.
    """
    return any(
        type(wrapper) is OptimizedModule and wrapper._orig_mod is model and is_zipvl(wrapper.dynamo_ctx.callback)
        for wrapper in gc.get_objects()
    )


# ---- Graphs, and the compilers that take them


def allow_data_dependent_sizes(graph: Graph) -> None:
    """Let operators of this graph return sizes that depend on data (the number of kept tokens).

    Only the ShapeEnv of this graph is changed. The global Dynamo flag for it makes Qwen2.5-VL fail to trace.
    """
    fake_mode = detect_fake_mode([node.meta.get("example_value") for node in graph.nodes])
    if fake_mode is not None and fake_mode.shape_env is not None:
        env = fake_mode.shape_env
        env.settings = dataclasses.replace(env.settings, allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True)


def gradient_switches(graph: Graph) -> list[Node]:
    """Return the calls of a graph that switch gradients on or off, such as the two ends of a `torch.no_grad()`."""
    return list(graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled))


def mark_size_as_changing(tensor: torch.Tensor, axis: int) -> None:
    """Have Dynamo compile for any size of this axis, where it can, as soon as it meets the tensor."""
    torch._dynamo.maybe_mark_dynamic(tensor, axis)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Return the modes of `torch.compile`, each with the settings of Inductor that it stands for."""
    from torch._inductor import list_mode_options  # takes a second, and only `inner="inductor"` needs it

    return list_mode_options()


def compile_with_inductor(gm: GraphModule, example_inputs: list[Any], mode: str | None) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor; a mode is one of `inductor_modes()`."""
    from torch._inductor.compile_fx import compile_fx  # as above

    patches = None if mode is None else inductor_modes()[mode]
    return compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[return-value]


def compile_with_aot_eager(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Send a Dynamo graph through AOTAutograd, and run what comes out of it operator by operator."""
    return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)


# ---- Running outside the graph


def with_real_tensors() -> AbstractContextManager[Any]:
    """Return a context in which tensors are real, also while Dynamo traces with fake ones."""
    return _disable_current_modes()


def as_plain_tensors() -> AbstractContextManager[Any]:
    """Return a context in which no subclass of Tensor takes part in a call by `__torch_function__`."""
    return torch._C.DisableTorchFunctionSubclass()


def keep_gpu_asleep(cycles: int) -> None:
    """Have the current CUDA stream wait, so that the host can queue work meanwhile; 1e6 cycles: half a millisecond."""
    torch.cuda._sleep(cycles)
