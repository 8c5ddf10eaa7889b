"""Triton kernels on the CPU, in Triton's interpreter: allocations are poisoned, results have a float64 model."""

import numpy
import pytest
import torch
import triton
from support import cases as shared_cases
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.kernels.common.dispatch import interpreted

# Triton 3.6's interpreter fails with NumPy 2.4: "only 0-dimensional arrays can be converted to Python scalars".
BROKEN = triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
POISON = {torch.int64: -(2**40), torch.int32: -(2**20)}


@pytest.fixture(scope="session")
def cases():
    return shared_cases


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill what the kernels allocate with NaN, so that what they leave unwritten shows."""
    if BROKEN:
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {numpy.__version__}")
    if not interpreted():
        pytest.skip("runs where there is no GPU; tests/gpu runs the kernels on one")

    def poison(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else POISON.get(x.dtype, 0))

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
