"""Fixtures: one thread without gradients, for numeric tests; nothing compiled and nothing said, for warnings."""

import pytest
import torch

from zipvl_compile.report import compile_report


@pytest.fixture(autouse=True)
def one_thread_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_compiled_or_said(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compile_report, "_warned", set())
    with torch.no_grad():
        yield
