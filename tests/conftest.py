"""Triton's interpreter for machines that have no GPU, compiling faster, and what tests share."""

import gc
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import torch

# Read by Triton when a kernel is defined, so before the first import of it, which Dynamo's is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch._dynamo.config
import torch._dynamo.guards

# Importable by name, without this folder on the path: there, tests/zipvl_compile would hide the package.
for name in ("support", "families"):
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(Path(__file__).parent / name)]
    sys.modules[name] = module_from_spec(spec)

# A fifth of the time of a compilation, most of what the tests do: descriptions of side effects that no one reads, a
# measurement of guards for which the processor's caches are flushed, and garbage sought among millions of live objects.
for owner, name, value in (
    (torch._dynamo.config, "side_effect_replay_policy", "silent"),
    (torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0),
):
    if hasattr(owner, name):
        setattr(owner, name, value)
gc.set_threshold(100_000, 50, 50)


@pytest.fixture(autouse=True, scope="module")
def no_compiled_code_of_other_files():
    """Past its recompile limit, Dynamo runs what it compiled for another test, whatever the options were there.

    Benchmarks and evaluations raise the limits of all calls, for good.
    """
    torch._dynamo.reset()
    limits = {name: getattr(torch._dynamo.config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with torch._dynamo.config.patch(limits):
        yield


@pytest.fixture(autouse=True, scope="session")
def machine_file_of_the_tests(tmp_path_factory):
    """What the tests decide must not depend on the file that their user has, nor change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZIPVL_CACHE_DIR", str(tmp_path_factory.mktemp("zipvl")))
        yield
