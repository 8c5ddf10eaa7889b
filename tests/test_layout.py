"""The house: imports run down and never in a circle, files are short, and every file has its tests where one looks."""

from __future__ import annotations

import ast
import graphlib

import pytest
from support.source_tree import (
    HAS_LINKS,
    LINKED,
    PACKAGE,
    ROOT,
    imports,
    imports_through_helpers,
    mirrored_tests,
    module_name,
    sources,
)

SOURCES = sources()
MODULES = frozenset(module_name(path) for path in SOURCES)
IMPORTS = {module_name(path): imports(path, MODULES) for path in SOURCES}
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]
MOST_LINES = 300


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


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_in_one_sitting(name):
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: split it by what it does"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("__init__.py")])
def test_a_file_has_tests_that_import_it(name):
    """`a/b.py` is imported by `tests/a/test_b.py`, itself or by helpers of its; parts of a pass or of an operator may
    also be imported by another test of that folder."""
    path = ROOT / name
    module, mirror = module_name(path), f"test_{path.stem}"
    beside = {test.stem: test for test in mirrored_tests(path)}
    own = mirror in beside and module in imports_through_helpers(beside[mirror], MODULES)
    others = [test for test in beside.values() if floor(module) < 2 and module in imports(test, MODULES)]
    assert own or others, f"add tests/{path.parent.relative_to(ROOT)}/{mirror}.py, or import it there"


@pytest.mark.skipif(not HAS_LINKS, reason="a source distribution holds no links")
@pytest.mark.parametrize("top", LINKED)
def test_linked_folders_are_namespaces(top):
    """With an `__init__.py`, they would be taken for top-level packages, and `kernels` for that of Hugging Face."""
    assert [str(path.relative_to(ROOT)) for path in (ROOT / top).rglob("__init__.py")] == []
    assert (ROOT / PACKAGE / top).is_symlink() and (ROOT / PACKAGE / top).resolve() == ROOT / top


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_run_without_the_tests(path):
    """Only tests find their helpers by name: `make bench` and `make gpu` collect the benchmarks alone."""
    helpers = {folder.name for folder in (ROOT / "tests").iterdir() if folder.is_dir()} - {PACKAGE}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert helpers.isdisjoint(name.partition(".")[0] for name in found)
