"""The backend is found by name alone, in a process that never imports this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch

sys.path.insert(0, {tests!r})
from support.tiny_llava import inputs, model
del sys.path[0]  # there, tests/zipvl_compile would hide the package

assert not any(name.startswith("zipvl_compile") for name in sys.modules)
f = model()
f.compile(backend="zipvl", options=dict(tau=0.6, min_tokens=0, inner="eager"))
out = f.generate(**inputs(text=20), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)

from zipvl_compile.cache.hf_names import cache_of  # loaded by now

layers = cache_of(out).layers
print([type(layer).__name__ for layer in layers])
print(all(layer.keys.shape[2] < layer.get_seq_length() for layer in layers))
"""


def test_model_compile_needs_no_import_of_this_package(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["['CompactLayer', 'CompactLayer']", "True"]


def test_importing_the_package_loads_no_models():
    """They take seconds, and the optional libraries that they load speak on standard error."""
    script = (
        "import sys, zipvl_compile; print([m for m in ('transformers.modeling_utils', 'torchao') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
