"""What the cache layers must know of the options while Dynamo traces them; constants of the compiled code.

Dynamo keeps compiled code apart by backend, options included.
"""

from __future__ import annotations

import torch

from zipvl_compile.dynamo import arguments_of, translator
from zipvl_compile.options import ZipVLOptions


def _options() -> ZipVLOptions:
    tracing = translator()
    given = {} if tracing is None else arguments_of(tracing.output.compiler_fn)
    return ZipVLOptions.parse(given.get("options"), given.get("mode"))


@torch.compiler.assume_constant_result
def evicts_to() -> str:
    """Return the option `evict` of the call that is traced."""
    return _options().evict


@torch.compiler.assume_constant_result
def evict_bits() -> int:
    """Return the option `evict_bits` of the call that is traced."""
    return _options().evict_bits


@torch.compiler.assume_constant_result
def reselect_every() -> int:
    """Return the option `reselect_every` of the call that is traced; 0 where nothing is ever dropped (tokens)."""
    options = _options()
    return 0 if options.keeps_all or options.evict == "keep" else options.reselect_every


@torch.compiler.assume_constant_result
def reselect_tokens() -> int:
    """Return the option `reselect_tokens` of the call that is traced (tokens)."""
    return _options().reselect_tokens
