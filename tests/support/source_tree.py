"""The source files of this repository as data: modules, what they import, where their tests are."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "zipvl_compile"
#: Folders at the top that are imported as parts of the package, through links inside it.
LINKED = ("passes", "kernels")
#: A source distribution holds no links, but these folders where the links are.
HAS_LINKS = all((ROOT / PACKAGE / top).is_symlink() for top in LINKED)


def sources() -> list[Path]:
    """Return every source file of the package, each once: files behind the links at their true place."""
    return sorted(
        path
        for top in (PACKAGE, *LINKED)
        for path in (ROOT / top).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def module_name(path: Path) -> str:
    """Return the name under which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, known: frozenset[str]) -> set[str]:
    """Return the modules among `known` that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & known | ({str(node.module)} if whole - known else set())
    return found & known


def mirrored_tests(path: Path) -> list[Path]:
    """Return the test files in the folder that mirrors that of a source file."""
    parts = path.parent.relative_to(ROOT).parts
    folder = Path(*parts[1:] if parts[1:2] and parts[1] in LINKED else parts)
    return sorted((ROOT / "tests" / folder).glob("test_*.py"))


def helpers() -> dict[str, Path]:
    """Return the modules that tests share, by the names under which they import them."""
    return {
        f"{folder}.{path.stem}": path
        for folder in ("support", "families")
        for path in ROOT.glob(f"tests/{folder}/*.py")
    }


def imports_through_helpers(path: Path, known: frozenset[str]) -> set[str]:
    """Return the modules among `known` that a test file imports, or its helpers and conftest files do."""
    shared = helpers()
    names = known | frozenset(shared)
    seen: set[str] = set()
    found: set[str] = set()
    queue = [path, *(folder / "conftest.py" for folder in path.parents if (folder / "conftest.py").exists())]
    while queue:
        for name in imports(queue.pop(), names) - seen:
            seen.add(name)
            if name in shared:
                queue.append(shared[name])
            else:
                found.add(name)
    return found
