"""How the operators are run: one implementation after the other, in poisoned memory; the float64 model of the paper."""

import pytest
import torch
from support import cases as shared_cases
from support import paper as model_of_the_paper
from support.implementations import ALL, parameter
from support.quiet import one_thread_without_gradients  # noqa: F401

POISON = {torch.int64: -(2**40), torch.int32: -(2**20)}


@pytest.fixture(scope="session")
def paper():
    return model_of_the_paper


@pytest.fixture(scope="session")
def cases():
    return shared_cases


@pytest.fixture(scope="module", params=[parameter(x) for x in ALL])
def implementation(request):
    """Return PyTorch, the Triton kernel in the interpreter, and the Triton kernel on a GPU, one after the other."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    """Fill what an implementation allocates on a CPU with NaN, so that what it leaves unwritten shows."""
    if "implementation" not in request.fixturenames or request.getfixturevalue("implementation").device != "cpu":
        return

    def poison(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else POISON.get(x.dtype, 0))

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def unbacked():
    """Return a compiler of functions in which sizes may depend on data; nothing that disk remembers is used."""

    def compiled(function, inner="aot_eager"):
        torch._dynamo.reset()
        return torch.compile(function, backend=inner, fullgraph=True, dynamic=True)

    patches = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(**patches), torch.compiler.config.patch(force_disable_caches=True):
        yield compiled
