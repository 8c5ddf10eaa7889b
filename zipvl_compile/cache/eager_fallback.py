"""A compacted cache, or a whole `generate`, outside the compiled model: right, or an error or a warning that helps."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from zipvl_compile.compiling import uncompiled_generate
from zipvl_compile.dynamo import PAST_THE_LIMIT, as_plain_tensors, runs_uncompiled_for_zipvl
from zipvl_compile.kernels.kv_view import UNREADABLE


def check_generate_is_compiled() -> None:
    """Warn where a prompt is read outside of every graph though the model, or what wraps it, was compiled for zipvl."""
    text = uncompiled_generate()
    if text is not None:
        warnings.warn(text, UserWarning, stacklevel=2)
    elif runs_uncompiled_for_zipvl():
        warn_of_uncompiled_prompt()


@functools.cache
def warn_of_uncompiled_prompt() -> None:
    """Warn, once per process, that PyTorch runs a compiled model's prompt uncompiled."""
    warnings.warn(
        "zipvl: a prompt of a compiled model is read uncompiled, so it is dense and its cache is full: compiling is "
        f"disabled there, or PyTorch gave up after its recompile limit. {PAST_THE_LIMIT}",
        UserWarning,
        stacklevel=2,
    )


@functools.cache
def warn_of_eager_decode() -> None:
    """Warn, once per process, that code that is not compiled decodes over a compacted cache."""
    warnings.warn(
        "A compacted KV cache is read by a model that runs uncompiled: right for one new token at a time, without the "
        "speed of zipvl, and an error for several tokens or padded batches. Either the model was never compiled (call "
        'model.compile(backend="zipvl") before the prompt), compiling is disabled, or Dynamo gave up after its '
        f"recompile limit (TORCH_LOGS=recompiles names what changes). {PAST_THE_LIMIT}",
        UserWarning,
        stacklevel=2,
    )


class _PhysicalKeys(torch.Tensor):
    """Keys of a compacted cache in eager mode: a mask of another length meets an error that says why."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            keys = args[1] if len(args) > 1 else kwargs["key"]
            _check_fits(keys.shape[-2], [args[3] if len(args) > 3 else kwargs.get("attn_mask")])
        with as_plain_tensors():
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and func in _VIEWS | _PRODUCTS:
            return result.as_subclass(_PhysicalScores if func in _PRODUCTS else cls)
        return result


class _PhysicalScores(torch.Tensor):
    """Scores over such keys, `[..., cached tokens]`, until a mask was applied to them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _MASKING:
            operands = [*args, *kwargs.values()]
            length = next(x.shape[-1] for x in operands if isinstance(x, cls))
            _check_fits(length, operands)
        with as_plain_tensors():
            result = func(*args, **kwargs)
        # What comes after the mask, or what is no score any more, is a plain tensor again.
        if isinstance(result, torch.Tensor) and func in _VIEWS | _SCALING:
            return result.as_subclass(cls)
        return result


def _check_fits(length: int, masks: Sequence[object]) -> None:
    """Check that masks have a column for each of `length` cached tokens, or one for all.

    Raises:
        RuntimeError: a mask does not fit: the model counts dropped tokens, too.
    """
    for mask in masks:
        if isinstance(mask, torch.Tensor) and mask.dim() > 0 and mask.shape[-1] not in (1, length):
            why = f"The eager model passed a mask over all {mask.shape[-1]} tokens, as it does for padded batches."
            raise RuntimeError(UNREADABLE.format(why=why))


_TENSOR = torch.Tensor
_VIEWS = {
    _TENSOR.__getitem__, _TENSOR.expand, _TENSOR.reshape, _TENSOR.view, _TENSOR.transpose, torch.transpose, _TENSOR.to,
    _TENSOR.float, _TENSOR.contiguous,
}  # fmt: skip
_PRODUCTS = {torch.matmul, _TENSOR.matmul, _TENSOR.__matmul__, torch.bmm, torch.einsum}
_SCALING = {torch.mul, _TENSOR.mul, _TENSOR.__mul__, torch.div, _TENSOR.div, _TENSOR.__truediv__}
_MASKING = {
    torch.add, _TENSOR.add, _TENSOR.add_, _TENSOR.__add__, _TENSOR.__iadd__, torch.masked_fill, _TENSOR.masked_fill,
    _TENSOR.masked_fill_, torch.where,
}  # fmt: skip


def read_in_eager(keys: torch.Tensor) -> torch.Tensor:
    """Return physical keys for an eager attention of one new token; a mask that does not fit them is an error."""
    return keys.as_subclass(_PhysicalKeys)
