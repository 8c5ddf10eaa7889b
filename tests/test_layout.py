"""The house: imports run down, and never in a circle."""

from __future__ import annotations

import graphlib

from support.source_tree import LINKED, PACKAGE, imports, module_name, sources

SOURCES = sources()
MODULES = frozenset(module_name(path) for path in SOURCES)
IMPORTS = {module_name(path): imports(path, MODULES) for path in SOURCES}


def floor(module: str) -> int:
    """Return how high a module stands: 0 for kernels, 1 for passes, 2 for the package itself."""
    first = [*module.split("."), ""][1]
    return {"kernels": 0, "passes": 1}.get(first, 2)


def test_the_tree_is_read():
    assert {f"{PACKAGE}.{name}" for name in ("backend", "dynamo", "options")} <= MODULES
    assert all(any(module.startswith(f"{PACKAGE}.{top}.") for module in MODULES) for top in LINKED)
    assert f"{PACKAGE}.dynamo" in IMPORTS[f"{PACKAGE}.backend"]


def test_imports_run_down():
    up = [(a, b) for a, others in IMPORTS.items() for b in others if floor(b) > floor(a)]
    assert up == []


def test_no_circle_of_imports():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_the_home_of_private_names_imports_nothing_of_ours():
    assert IMPORTS[f"{PACKAGE}.dynamo"] == set()
