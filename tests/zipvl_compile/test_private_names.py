"""Private names of PyTorch stand in few files: of the package, of the passes and of the operators."""

from __future__ import annotations

import ast
import re

import pytest
from support.source_tree import ROOT, sources, tree

HOMES = (
    "zipvl_compile/dynamo.py",
    "zipvl_compile/inner_compilers.py",
    "passes/graph/private.py",
    "kernels/common/private.py",
)
#: Attributes of compiled models that begin with an underscore, read from whatever object.
OF_OBJECTS = {"_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable", "dynamo_ctx"}
PRIVATE = re.compile(r"\btorch(\.\w+)*\._(?!_)")
FILES = {str(path.relative_to(ROOT)): path for path in sources()}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for the expression a.b.c, "" for any other."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def private_names(source: ast.Module) -> list[str]:
    """Return the private names of PyTorch in a file: imports, attributes, and strings that spell one."""
    found = []
    for node in ast.walk(source):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        found += [name for name in names if PRIVATE.search(name)]
        found += [node.attr] if isinstance(node, ast.Attribute) and node.attr in OF_OBJECTS else []
        found += [node.value] if isinstance(node, ast.Constant) and node.value in OF_OBJECTS else []
    return found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import torch._dynamo", 1),
        ("from torch._guards import detect_fake_mode", 1),
        ("from torch.utils import _pytree", 1),
        ("torch._C._set_grad_enabled", 2),  # and `torch._C` in it
        ("torch.cuda._sleep(3)", 1),
        ("getattr(f, '_orig_mod', f)", 1),
        ("f._compiled_call_impl is None", 1),
        ("log = 'torch._dynamo.variables'", 1),
        ("import torch.fx; torch.__version__; self._cache; torch.cat(x)", 0),
    ],
)
def test_the_scan_sees(text, count):
    assert len(private_names(ast.parse(text))) == count


@pytest.mark.parametrize("name", [name for name in FILES if name not in HOMES])
def test_no_private_name_of_torch_in(name):
    assert private_names(tree(FILES[name])) == []


def test_the_homes_hold_some():
    assert all(private_names(tree(FILES[name])) for name in HOMES)
