"""How tests are spread over processes, and Triton's interpreter for machines that have no GPU."""

import os

import pytest
import torch

# Read by Triton when a kernel is defined, so before the first import of one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """A file at a time, as its fixtures want it, but families one by one."""
    for item in items:
        if "famil" not in item.path.name:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(autouse=True, scope="module")
def no_compiled_code_of_other_files():
    """Past its recompile limit, Dynamo runs what it compiled for another test, whatever the options were there."""
    torch._dynamo.reset()
