"""Triton and its language where they are installed; elsewhere, what it takes to define kernels that never run.

Triton has wheels for Linux alone, and PyTorch for CPUs does not need it. Without it, `use_triton` picks no kernel.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from zipvl_compile.kernels.common.private import LOGGER_OF_TRITON_OPS

__all__ = ["HAS_TRITON", "TritonError", "interpreted", "tl", "triton"]


def _as_it_is(value: Any) -> Any:
    return value


try:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.errors import TritonError
except ImportError:
    HAS_TRITON = False
    triton = SimpleNamespace(jit=_as_it_is)  # type: ignore[assignment]
    tl = SimpleNamespace(constexpr=_as_it_is)  # type: ignore[assignment]
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))  # type: ignore[assignment]
    TritonError = RuntimeError  # type: ignore[assignment,misc]
    logging.getLogger(LOGGER_OF_TRITON_OPS).addFilter(lambda record: "Triton not available" not in record.msg)
else:
    HAS_TRITON = True


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on the CPU."""
    return bool(knobs.runtime.interpret)
