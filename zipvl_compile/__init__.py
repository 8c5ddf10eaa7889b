"""torch.compile backend that gives Hugging Face vision-language models sparse prefill and a compacted KV cache.

    model.compile(backend="zipvl")
    out = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))

Importing this package is not needed for that; it holds the tools around it.
"""

from zipvl_compile.cache.fork import fork
from zipvl_compile.cache.grow import grow
from zipvl_compile.cache.kept_tokens import kept_tokens
from zipvl_compile.compiling import compile
from zipvl_compile.per_request import settings
from zipvl_compile.report.compile_report import recent_reports
from zipvl_compile.report.explain import explain
from zipvl_compile.report.requests import RequestStats, requests
from zipvl_compile.report.stats import stats
from zipvl_compile.version import __version__

__all__ = [
    "RequestStats",
    "__version__",
    "compile",
    "explain",
    "fork",
    "grow",
    "kept_tokens",
    "recent_reports",
    "requests",
    "settings",
    "stats",
]
