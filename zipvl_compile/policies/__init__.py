"""Selection rules, one a file: `policy.py` holds `POLICY`, and `options={"policy": "policy"}` asks for it.

Adding one: one file here that states what it does as data (see `Policy`), and one test.
"""

from __future__ import annotations

import importlib
import pkgutil

from zipvl_compile.passes.policy import Policy


def names() -> list[str]:
    """Return the names of all rules."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "presets")


def policy(name: str) -> Policy:
    """Return the rule of a name that `names` gives."""
    return importlib.import_module(f"{__name__}.{name}").POLICY
