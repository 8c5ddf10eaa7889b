"""A compacted cache, or a whole `generate`, outside the compiled model: right, or an error or a warning that helps."""

from __future__ import annotations

import sys
import warnings
import weakref
from types import FrameType

import torch
import torch.nn.functional as F

from zipvl_compile.dynamo import as_plain_tensors, is_compiled_in_place, is_wrapped_for_zipvl
from zipvl_compile.kernels.kv_view import UNREADABLE

_checked: weakref.WeakSet = weakref.WeakSet()


def check_generate_is_compiled() -> None:
    """Warn once per model when `torch.compile(model, backend="zipvl").generate(...)` runs the original model.

    PyTorch's OptimizedModule forwards `generate` to the module that it wraps, so nothing is compiled there.
    """
    model = _generating()
    if model is None or model in _checked:
        return
    _checked.add(model)
    if not is_compiled_in_place(model) and is_wrapped_for_zipvl(model):
        warnings.warn(
            'torch.compile(model, backend="zipvl").generate(...) runs the original, uncompiled model: PyTorch forwards '
            'generate to it. Use model.compile(backend="zipvl") and then model.generate(...), which compiles in place.',
            UserWarning,
            stacklevel=2,
        )


def _generating() -> torch.nn.Module | None:
    """Return the module whose `generate` is running, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "generate" else None
        if isinstance(owner, torch.nn.Module):
            return owner
        frame = frame.f_back
    return None


class _PhysicalKeys(torch.Tensor):
    """Keys of a compacted cache in eager mode, which turn a mask of logical length into an error that says why."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        try:
            with as_plain_tensors():
                result = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if func is F.scaled_dot_product_attention or func in _ARITHMETIC:
                why = "The eager model passed a mask over all tokens, as it does for padded batches."
                raise RuntimeError(UNREADABLE.format(why=why)) from error
            raise
        # Views of the keys and their raw scores stay watched; everything after the mask is a plain tensor again.
        if isinstance(result, torch.Tensor) and (func in _VIEWS or func in _SCORES):
            return result.as_subclass(cls)
        return result


_VIEWS = {
    torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.transpose,
    torch.transpose, torch.Tensor.to, torch.Tensor.contiguous,
}  # fmt: skip
_SCORES = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mul, torch.Tensor.__mul__}
_ARITHMETIC = _SCORES | {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.masked_fill, torch.where}


def read_in_eager(keys: torch.Tensor) -> torch.Tensor:
    """Return physical keys for an eager attention of one new token; a mask that does not fit them is an error."""
    return keys.as_subclass(_PhysicalKeys)
