"""Where Triton is not installed, all that does not need a GPU works as it does elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import tiny_llama

from zipvl_compile.cache.hf_names import CACHE_NAME
from zipvl_compile.kernels.common import language
from zipvl_compile.kernels.common.language import HAS_TRITON, interpreted, tl, triton

SCRIPT = """
import sys
sys.modules["triton"] = None  # what an import of a package that is not there does
import torch
sys.path.insert(0, {tests!r})
from support import tiny_llama
del sys.path[0]  # there, tests/zipvl_compile would hide the package

from zipvl_compile.kernels.select_tokens import select_tokens
for inner in ("eager", "inductor"):
    model = tiny_llama.compiled(dict(num_hidden_layers=1), tau=0.6, inner=inner)
    out = model.generate(tiny_llama.prompt(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    print(out.sequences.tolist(), out[{cache!r}].layers[0].keys.shape)
try:
    select_tokens(torch.ones(1, 1, 8), torch.ones(1, 8), tau=0.5, kernel="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton_a_model_compiles_and_generates_the_same():
    model = tiny_llama.compiled({"num_hidden_layers": 1}, tau=0.6)
    out = model.generate(tiny_llama.prompt(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    expected = f"{out.sequences.tolist()} {out[CACHE_NAME].layers[0].keys.shape}"
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]), cache=CACHE_NAME)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *got, refusal = done.stdout.splitlines()
    assert got == [expected, expected]
    assert 'kernel: expected "auto" or "torch" for a Python without Triton, got "triton"' in refusal
    assert "Triton not available" not in done.stderr


def test_with_triton_the_kernels_are_its_own():
    assert HAS_TRITON and triton is sys.modules["triton"] and tl is sys.modules["triton.language"]


def test_the_interpreter_is_triton_s_own_switch(monkeypatch):
    for value in (True, False):
        monkeypatch.setattr(language.knobs.runtime, "interpret", value)
        assert interpreted() is value
