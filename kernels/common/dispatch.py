"""Which implementation of an operator runs: the Triton kernel, or plain PyTorch.

Every operator takes `kernel`: "auto" runs Triton on GPUs and PyTorch elsewhere, "torch" always PyTorch, "triton" always
Triton, which on a CPU needs Triton's interpreter (TRITON_INTERPRET=1 before the first import) and is for tests.
In the operators' schemas it is `kernel_`: Inductor calls what it does not compile as `create(kernel, *args, **kwargs)`,
where another `kernel` has no place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from zipvl_compile.kernels.common.checks import fail
from zipvl_compile.kernels.common.language import HAS_TRITON, interpreted

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256  # a tile of keys and one of values must fit into shared memory


def is_traced(x: torch.Tensor) -> bool:
    """Return whether a compiler is looking at `x`: then its sizes may be symbols, and a check would become a guard."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter)


def has_known_sizes(*tensors: torch.Tensor) -> bool:
    """Return whether no size of a tensor depends on data, so that a compiler may ask what it likes of them."""
    return not any(free_unbacked_symbols(size) for x in tensors for size in x.shape if not isinstance(size, int))


def launchable(kernel: Any, x: torch.Tensor) -> Any:
    """Return `kernel` so that `[grid](...)` launches it on the device of `x`, or puts it into the graph being traced.

    Triton itself launches on the current device, which is another one where a model is spread over several GPUs.
    """
    if is_traced(x):
        return torch.library.wrap_triton(kernel)
    return _OnDevice(kernel, x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else kernel


@dataclass(frozen=True)
class _OnDevice:
    kernel: Any
    device: torch.device

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with torch.cuda.device(self.device):
                self.kernel[grid](*args, **kwargs)

        return launch


def use_triton(operator: str, kernel: str, *tensors: torch.Tensor) -> bool:
    """Return whether the Triton kernel of an operator runs.

    Args:
        operator: name, for errors.
        kernel: "auto", "triton" or "torch".
        tensors: what the kernel reads; heads of `[B, H, n, D]` tensors are at most `MAX_HEAD_DIM` wide.

    Raises:
        ValueError: an unknown name, or "triton" for what the kernel cannot do.
    """
    if kernel not in ("auto", "triton", "torch"):
        fail(operator, "kernel", '"auto", "triton" or "torch"', repr(kernel), 'Use "auto".')
    if kernel == "torch":
        return False
    reason = _unsupported(tensors)
    if reason and kernel == "triton":
        fail(operator, "kernel", f'"auto" or "torch" for {reason}', '"triton"', 'Use "auto", which picks per shape.')
    return not reason and (kernel == "triton" or tensors[0].is_cuda)


def _unsupported(tensors: tuple[torch.Tensor, ...]) -> str:
    if not HAS_TRITON:
        return "a Python without Triton"
    if not (tensors[0].is_cuda or (interpreted() and tensors[0].device.type == "cpu")):
        return f"tensors on {tensors[0].device.type}"
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"dtype {x.dtype}"
        if x.dim() == 4 and x.shape[3] > MAX_HEAD_DIM:
            return f"head_dim {x.shape[3]}, more than {MAX_HEAD_DIM}"
    return ""
