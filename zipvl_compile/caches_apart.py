"""PyTorch's caches of compiled code on disk, apart for every version of this package's operators.

They know operators by name, and hold what an operator of that name was taken apart into.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch


def caches_apart() -> AbstractContextManager[Any]:
    """Return a context in which those caches know compiled code of this version of the operators alone."""
    config: Any = torch.compiler.config
    return config.patch(cache_key_tag=f"{config.cache_key_tag} zipvl {digest_of_operators()}")


@functools.cache
def digest_of_operators() -> str:
    """Return a digest of the sources of the operators."""
    found = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "kernels").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
