"""torch.compile backend that gives Hugging Face vision-language models sparse prefill and a compacted KV cache.

    model.compile(backend="zipvl")
    out = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))

Importing this package is not needed for that; it holds the tools around it.
"""

from zipvl_compile.compiling import compile
from zipvl_compile.explain import explain
from zipvl_compile.kept import kept_tokens
from zipvl_compile.report import recent_reports
from zipvl_compile.version import __version__

__all__ = ["__version__", "compile", "explain", "kept_tokens", "recent_reports"]
