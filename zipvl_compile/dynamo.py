"""Every private name of PyTorch that this package needs, each behind a function that says what it is for.

PyTorch has no public call for most of what a backend must know: for whom Dynamo traces, whose call runs, what
stands behind a compiled model. Nothing of this package is imported here, so that all of it may import this.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
import torch._dynamo
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext, innermost_backend
from torch._dynamo.exc import ShortenTraceback, SkipFrame
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard, TracingContext, detect_fake_mode
from torch.fx import Graph, Node
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])

#: How often PyTorch lets a code object be compiled, unless told otherwise.
PYTORCHS_RECOMPILE_LIMIT = 8
#: Loggers that warn about graph breaks and data-dependent sizes while Dynamo traces.
TRACING_LOGGERS = ("torch._dynamo.variables.tensor", "torch._subclasses.fake_tensor")
#: What to do about code that PyTorch does not compile any more.
PAST_THE_LIMIT = (
    "Compile with zipvl_compile.compile(model, ...), which keeps compiled code apart (since PyTorch 2.13), call "
    "torch.compiler.reset() after changes of options, or raise torch._dynamo.config.recompile_limit."
)


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
    return getattr(_unwrapped(backend)[0], "is_zipvl", False) is True


def arguments_of(backend: Any) -> dict[str, Any]:
    """Return what the `torch.compile` call behind a backend passes to it by keyword: `options`, `mode`."""
    return _unwrapped(backend)[1]


def _unwrapped(backend: Any) -> tuple[Any, dict[str, Any]]:
    if not callable(backend):
        return None, {}
    backend = innermost_backend(backend)
    # In a DistributedDataParallel module, Dynamo hands graphs to the method of an optimizer, which splits them.
    splitter = getattr(backend, "__self__", None)
    if isinstance(splitter, DDPOptimizer):
        backend = innermost_backend(splitter.backend_compile_fn)
    arguments = dict(getattr(backend, "kwargs", None) or {})
    backend = getattr(backend, "compiler_fn", backend)
    while isinstance(backend, functools.partial):
        arguments = backend.keywords | arguments
        backend = backend.func
    return backend, arguments


# ---- What Dynamo is doing right now


def translator() -> Any:
    """Return Dynamo's translator of the frame that is traced on this thread, or None."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # nothing is being traced on this thread
        return None


def leave_uncompiled(*functions: str) -> None:
    """Have Python run the traced frame, now and ever after, if it is that of a function of one of these names."""
    tracing = translator()
    if tracing is not None and tracing.output.root_tx.f_code.co_name in functions:
        raise SkipFrame(f"zipvl leaves {tracing.output.root_tx.f_code.co_name} uncompiled")


# ---- The call of a compiled function that is running

_COMPILED_CALL = next(
    part
    for part in _TorchDynamoContext.__call__.__code__.co_consts
    if getattr(part, "co_name", None) == "compile_wrapper"
)


def _compiled_call() -> FrameType | None:
    """Return the frame of the innermost compiled function that runs on this thread, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _COMPILED_CALL:
        frame = frame.f_back
    return frame


def backend_of_call() -> Any:
    """Return the backend of the `torch.compile` call whose function runs on this thread, or None.

    Where Dynamo only runs what is compiled, that need not be the backend that compiled it.
    """
    frame = _compiled_call()
    callback = None if frame is None else frame.f_locals["self"].callback
    return innermost_backend(callback) if callable(callback) else None


def runs_uncompiled_for_zipvl() -> bool:
    """Return whether Python runs code of a function that was compiled with zipvl, outside of every graph."""
    return not torch.compiler.is_compiling() and is_zipvl(backend_of_call())


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


def set_up_calls(least: int, changing: str) -> None:
    """Let zipvl's calls of compiled functions compile each code object `least` times in the place of PyTorch's 8.

    Dynamo asks hooks for a description of every compile before it looks at the limit; this one raises it until the call
    has returned. Calls of other backends, and a limit that the user set, stay as they are.

    Args:
        least: times.
        changing: regular expressions, with commas between, of the numbers that are taken for any number at once, as in
            `torch.compiler.config.dynamic_sources`.
    """
    config, public = torch._dynamo.config, cast(Any, torch.compiler.config)
    most = max(config.accumulated_recompile_limit, 4 * least)  # where a graph break lies behind every layer
    patch = config._make_closure_patcher(recompile_limit=least, accumulated_recompile_limit=most)

    def describe() -> str:
        frame = _compiled_call()
        if frame is None or not is_zipvl(frame.f_locals["self"].callback):
            return ""
        if config.recompile_limit == PYTORCHS_RECOMPILE_LIMIT:
            frame.f_locals["cleanups"].append(patch())  # what is done when the call returns
        if changing not in public.dynamic_sources:
            all_of_them = ",".join(filter(None, (public.dynamic_sources, changing)))
            frame.f_locals["cleanups"].append(public._make_closure_patcher(dynamic_sources=all_of_them)())
        return "zipvl"

    torch._dynamo.register_hook_for_recompile_user_context(describe)


def raise_recompile_limit_of_all(least: int = 64) -> None:
    """Let every call of this process, zipvl's or not, compile each code object `least` times: for fair comparisons."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, least)


def apart() -> dict[str, Any]:
    """Return arguments of `torch.compile` that keep its compiled code apart from that of other calls (PyTorch 2.13)."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


# ---- Compiled models


def original_of(model: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def in_place_for_zipvl(model: torch.nn.Module) -> bool:
    """Return whether `model.compile(backend="zipvl")` was called."""
    call: Any = model._compiled_call_impl
    cells = {} if call is None else dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True))
    return "self" in cells and is_zipvl(cells["self"].cell_contents.callback)


def is_wrapped_for_zipvl(model: torch.nn.Module) -> bool:
    """Return whether some `torch.compile(model, backend="zipvl")`, other than a deep copy of one, wraps the module."""
    return any(one._orig_mod is model and is_zipvl(one.dynamo_ctx.callback) for one in list(_wrappers))


# Nothing leads from a module to its wrapper. `torch.compile` looks up its backend, which imports this file, then wraps.
_wrappers: WeakSet[OptimizedModule] = WeakSet()


def _note_wrapper(module: torch.nn.Module, name: str, _: torch.nn.Module | None) -> None:
    if type(module) is OptimizedModule and name == "_orig_mod":
        _wrappers.add(module)


register_module_module_registration_hook(_note_wrapper)


# ---- Graphs and their inputs


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


def mark_address_as_fixed(tensor: torch.Tensor) -> None:
    """Let CUDA graphs write into a tensor in place; another tensor in its place is recorded anew, not compiled anew."""
    torch._dynamo.mark_static_address(tensor, guard=False)


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
