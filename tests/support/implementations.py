"""What a test of an operator runs: PyTorch, the Triton kernel in Triton's interpreter, the Triton kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
import triton
from torch.utils._pytree import tree_map_only

from zipvl_compile.kernels.common.language import interpreted

# Triton 3.6's interpreter fails with NumPy 2.4: "only 0-dimensional arrays can be converted to Python scalars".
BROKEN = triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)


@dataclass(frozen=True)
class Implementation:
    """One way to run the operators, over tensors on the CPU.

    Attributes:
        kernel: what the operators are told.
        device: where they run.
        dtypes: what they take, the finest first.
    """

    name: str
    kernel: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def finest(self) -> torch.dtype:
        return self.dtypes[0]

    def given(self, *tensors: Any) -> list[Any]:
        """Return the tensors on the device: themselves on a CPU."""
        return tree_map_only(torch.Tensor, lambda x: x.to(self.device), list(tensors))

    def compute(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function with its tensors on the device; return its results on the CPU."""
        out = function(*self.given(*arguments), **dict(zip(options, self.given(*options.values()), strict=True)))
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, out)

    def run(self, operator: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call an operator by this implementation, or by the `kernel` that is given."""
        return self.compute(operator, *arguments, **{"kernel": self.kernel, **options})


NARROW = (torch.float32, torch.float16, torch.bfloat16)
_MARKS = {
    "torch": [],
    "interpreted": [
        pytest.mark.skipif(not interpreted(), reason="runs where there is no GPU"),
        pytest.mark.skipif(BROKEN, reason=f"Triton {triton.__version__} with NumPy {numpy.__version__}"),
    ],
    "cuda": [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
}
ALL = (
    Implementation("torch", "torch", "cpu", (torch.float64, *NARROW)),
    Implementation("interpreted", "triton", "cpu", NARROW),
    Implementation("cuda", "triton", "cuda", NARROW),
)


def parameter(implementation: Implementation, *others: Any) -> Any:
    """Return a parameter set of pytest that is skipped where the implementation cannot run."""
    names = [implementation.name, *map(str, others)]
    return pytest.param(implementation, *others, marks=_MARKS[implementation.name], id="-".join(names))


def only(*names: str) -> pytest.MarkDecorator:
    """Run a test by some of the implementations."""
    chosen = [parameter(x) for x in ALL if x.name in names]
    return pytest.mark.parametrize("implementation", chosen, indirect=True)


triton_only = only("interpreted", "cuda")
gpu_only = only("cuda")
in_every_dtype = pytest.mark.parametrize(
    ("implementation", "dtype"), [parameter(x, dtype) for x in ALL for dtype in x.dtypes], indirect=["implementation"]
)
# The interpreter takes half a second a case, and the other layouts are among the SHAPES of `compare_kernels`.
in_every_layout = pytest.mark.parametrize(
    ("implementation", "heads"),
    [parameter(x, h) for x in ALL for h in ("mha", "gqa4", "gqa7", "mqa") if x.name != "interpreted" or h == "gqa4"],
    indirect=["implementation"],
)
