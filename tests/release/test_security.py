"""What SECURITY.md says of the code: none of a checkpoint is run, and the files that load models are those it names."""

from __future__ import annotations

import ast
import json

import pytest
from support.source_tree import PACKAGE, ROOT, module_name, sources, tree

SECURITY = (ROOT / "SECURITY.md").read_text()
MODULES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
CALLS = ("eval", "exec", "torch.load", "numpy.load", "np.load", "yaml.load")


def risky(source: ast.Module) -> list[str]:
    """Return what in a file could run code that a data file holds."""
    found = []
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if str(node.module).partition(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            found += [name for name in [ast.unparse(node.func)] if name in CALLS]
            found += [word.arg for word in node.keywords if word.arg in ("trust_remote_code", "weights_only")]
    return found


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_no_file_runs_code_of_a_checkpoint(path):
    assert risky(tree(path)) == []


@pytest.mark.parametrize(
    "text", ["import pickle", "from joblib import load", "torch.load(f)", "eval(x)", "f(trust_remote_code=True)"]
)
def test_what_would_run_code_is_found(text):
    assert len(risky(ast.parse(text))) == 1


def test_the_files_that_load_models_are_those_that_are_named():
    loading = {str(path.relative_to(ROOT / PACKAGE)) for path in sources() if ".from_pretrained(" in path.read_text()}
    assert loading == {name for name in loading if f"`{name}`" in SECURITY} and len(loading) >= 3


def test_the_bundled_checkpoints_are_safetensors_and_json_without_code():
    folders = sorted((ROOT / PACKAGE / "demo" / "tiny_lvlm").glob("checkpoint*"))
    files = [path for folder in folders for path in folder.iterdir()]
    assert len(folders) == 2 and {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any("auto_map" in json.loads(path.read_text()) for path in files if path.suffix == ".json")
