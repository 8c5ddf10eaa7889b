"""Which implementation of an operator runs, and what is refused."""

import pytest
import torch

from zipvl_compile.kernels.common import dispatch
from zipvl_compile.kernels.common.dispatch import use_triton

X = torch.zeros(1, 2, 3, 64)
ON_A_CPU = {"auto": False, "torch": False}


@pytest.mark.parametrize("kernel", ON_A_CPU)
def test_a_cpu_runs_pytorch(kernel):
    assert use_triton("gather_tokens", kernel, X) is ON_A_CPU[kernel]


def test_the_interpreter_runs_when_asked(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    assert use_triton("gather_tokens", "triton", X)
    assert not use_triton("gather_tokens", "auto", X)


REFUSED = {
    "cpu": (X, '"auto" or "torch" for tensors on cpu'),
    "dtype": (X.double(), '"auto" or "torch" for dtype torch.float64'),
    "head_dim": (torch.zeros(1, 2, 3, 512), '"auto" or "torch" for head_dim 512, more than 256'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_can_do_is_refused_by_name(monkeypatch, name):
    x, message = REFUSED[name]
    monkeypatch.setattr(dispatch, "interpreted", lambda: name != "cpu")
    with pytest.raises(ValueError, match=r"^zipvl::gather_tokens: kernel: ") as raised:
        use_triton("gather_tokens", "triton", x)
    assert message in str(raised.value)
    assert not use_triton("gather_tokens", "auto", x)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match='kernel: expected "auto", "triton" or "torch", got \'cuda\''):
        use_triton("gather_tokens", "cuda", X)


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    entered, launched = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((grid, args, kwargs, list(entered)))

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    second = torch.device("cuda", 1)
    dispatch._OnDevice(Kernel(), second)[(2, 3)](X, BLOCK=4)
    assert launched == [((2, 3), (X,), {"BLOCK": 4}, [second])] and not entered
    kernel = Kernel()
    assert dispatch.launchable(kernel, X) is kernel, "on a CPU there is no device to enter"
