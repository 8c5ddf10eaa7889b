"""The float64 model of the paper and the shared cases, loaded by path (the test folders are no packages)."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def _load(name):
    key = f"zipvl_tests_reference_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, Path(__file__).parent / f"{name}.py")
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


@pytest.fixture(scope="session")
def paper():
    return _load("paper")


@pytest.fixture(scope="session")
def cases():
    return _load("cases")


@pytest.fixture(autouse=True)
def one_thread_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
