"""Every private name of PyTorch that the passes use; zipvl_compile/dynamo.py holds those of the package."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch._functorch.vmap
import torch._refs
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, disable_fake_tensor_cache
from torch.fx import Node
from torch.utils._pytree import tree_leaves

OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
NATIVE = (torch._C._nn, torch._C._linalg)  # type: ignore[attr-defined]  # where functions of torch.nn.functional and torch.linalg come from
# The entry and the exit of a traced vmap; releases differ in what they trace.
_VMAP = (torch._C._functorch, *filter(None, [getattr(torch._functorch, "predispatch", None)]))
ADD_BATCH_DIM = tuple(module._add_batch_dim for module in _VMAP if hasattr(module, "_add_batch_dim"))
REMOVE_BATCH_DIM = tuple(module._remove_batch_dim for module in _VMAP if hasattr(module, "_remove_batch_dim"))
TENSOR = (torch.tensor, torch._refs.tensor)  # the latter where its number is symbolic
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
COLLECTIVES = torch.ops._c10d_functional  # between ranks, as values

__all__ = [
    "ADD_BATCH_DIM", "COLLECTIVES", "ENTER_AUTOCAST", "EXIT_AUTOCAST", "NATIVE", "REMOVE_BATCH_DIM", "TENSOR",
    "FakeTensor", "OpOverload", "OpOverloadPacket", "copy_source", "fake_mode_of", "faking", "leaves",
    "without_repeated_fakes",
]  # fmt: skip


def leaves(value: Any) -> list[Any]:
    """Return what nested tuples, lists and dictionaries hold, in order."""
    return tree_leaves(value)


def fake_mode_of(values: list[Any]) -> Any:
    """Return the mode of the first fake tensor of `values`, or None.

    Not `detect_fake_mode`: while a backend runs, that returns a mode other than that of the recorded values.
    """
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextlib.contextmanager
def faking(mode: Any) -> Any:
    """Run calls on fake values of a mode (None: plain numbers), as Dynamo does.

    With the Python dispatcher: C++ decompositions of some releases ask symbolic sizes for numbers.
    """
    with mode or contextlib.nullcontext(), enable_python_dispatcher():
        yield


def without_repeated_fakes() -> contextlib.AbstractContextManager[None]:
    """Return a context in which the inner compiler computes fake results anew, and keeps none for calls that repeat.

    With sizes of its own in each layer hardly any call repeats, and keeping costs as much as computing.
    """
    mode = detect_fake_mode()
    return contextlib.nullcontext() if mode is None else disable_fake_tensor_cache(mode)


def copy_source(old: Node | None, new: Node) -> None:
    """Note where Dynamo found an input of the user's, which AOTAutograd asks for; None is an input of ours."""
    if old is None or hasattr(old, "_dynamo_source"):
        new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]
