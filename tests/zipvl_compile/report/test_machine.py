"""The speed of the machine: measured once, within the memory that is free, and never a reason to fail."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from support.tiny_llava import compiled, inputs

from zipvl_compile.report import machine as module
from zipvl_compile.report.known_machines import CPU, GENERIC, H100, scaled
from zipvl_compile.report.machine import machine, sparse_prefill_attention
from zipvl_compile.report.machine_file import rounded

HERE, GPU = torch.device("cpu"), torch.device("cuda", 0)
GB = 1 << 30


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A folder without a file, and a process that knows nothing."""
    monkeypatch.setenv("ZIPVL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_asked_for", {})
    module._speed.cache_clear()
    yield tmp_path
    module._speed.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of which only the name is known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())


@pytest.fixture
def free(monkeypatch):
    """Return a function that sets how many bytes are free on every GPU."""
    return lambda count: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (count, 80 * GB))


def another_process():
    module._speed.cache_clear()
    module._asked_for.clear()


def test_this_machine_is_measured_once_for_all_processes(monkeypatch, folder):
    measured = machine(HERE, torch.float32)
    assert all(value >= 0 for value in dataclasses.astuple(measured)) and measured.attend > 0
    assert measured not in (CPU, H100) and measured == rounded(measured)
    monkeypatch.setattr(module, "_measure", None)
    assert machine(HERE, torch.float32) is measured
    another_process()
    assert machine(HERE, torch.float32) == measured
    (speed,) = module.asked_for(HERE)
    assert speed.origin.startswith("measured 20") and speed.file == folder / "machines.json"
    assert str(speed.file) in str(speed) and f"{torch.get_num_threads()} threads, float32" in str(speed)


def test_other_threads_and_dtypes_are_other_machines(monkeypatch):
    speeds = iter([dataclasses.replace(CPU, attend=2.0**-i) for i in range(30, 40)])
    monkeypatch.setattr(module, "_measure", lambda *given: next(speeds))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = machine(HERE, torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert len({one.attend, machine(HERE, torch.float32).attend, machine(HERE, torch.bfloat16).attend}) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    another_process()
    assert machine(HERE, torch.float32) == one


def test_renewed_on_demand(monkeypatch):
    monkeypatch.setattr(module, "_measure", lambda *given: dataclasses.replace(CPU, site=1.0))
    before = machine(HERE, torch.float32)
    monkeypatch.setattr(module, "_measure", lambda *given: dataclasses.replace(CPU, site=2.0))
    assert before.site == machine(HERE, torch.float32).site == 1
    assert module.renewed(HERE, torch.float32).machine.site == machine(HERE, torch.float32).site == 2


@pytest.mark.parametrize(("device", "known"), [(HERE, CPU), (GPU, H100)], ids=["cpu", "gpu"])
def test_without_a_place_nothing_is_measured(monkeypatch, caplog, folder, gpu, device, known):
    """What was measured could not be told to other processes."""
    (folder / "file").touch()
    monkeypatch.setenv("ZIPVL_CACHE_DIR", str(folder / "file"))
    monkeypatch.setattr(module, "_measure", fails_with(AssertionError("measured")))
    assert machine(device, torch.bfloat16) == known
    assert len(caplog.records) == 1 and "ZIPVL_CACHE_DIR" in caplog.text and "cannot be written" in caplog.text
    assert "in no file" in str(module.speed(device, torch.bfloat16))
    with pytest.raises(OSError, match="cannot be written"):
        module.renewed(device, torch.bfloat16)


def test_measuring_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    machine(HERE, torch.float64)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("free_bytes", "large", "heads"), [(60 * GB, 8192, 32), (2 * GB, 4096, 32), (GB, 4096, 16), (GB // 2, 2048, 8)]
)
def test_little_free_memory_gives_small_sizes_that_fit(free, free_bytes, large, heads):
    free(free_bytes)
    sizes = module._sizes(GPU, torch.bfloat16)
    assert (sizes.large, sizes.heads) == (large, heads)
    assert sizes.memory(2) <= free_bytes / 4
    assert sizes.large >= 4 * sizes.small > 0


def test_wider_elements_are_counted(free):
    free(2 * GB)
    assert module._sizes(GPU, torch.float32).heads < module._sizes(GPU, torch.bfloat16).heads


def test_the_bound_covers_what_measuring_holds():
    """What is drawn and copied by `_measure`, counted here by hand, takes no more than `memory` says."""
    for sizes in (module._ON_CPU, *module._ON_GPU):
        whole = sizes.heads * sizes.large * sizes.width
        held = 3 * whole + whole + 1.5 * whole + 3 * sizes.heads * sizes.small * sizes.width + sizes.side**2
        at_once = max(whole, sizes.large**2, sizes.side**2)  # an output, a mask as numbers, a product
        assert sizes.memory(2) >= 2 * (held + at_once) + sizes.large**2


def fails_with(error):
    def measure(*arguments):
        raise error

    return measure


@pytest.mark.parametrize(("device", "known"), [(HERE, CPU), (GPU, H100)], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to"), RuntimeError("no kernel image"), KeyError("x")]
)
def test_a_failure_gives_a_known_machine_to_every_process_and_one_warning(
    monkeypatch, caplog, free, gpu, device, known, error
):
    free(60 * GB)
    monkeypatch.setattr(module, "_measure", fails_with(error))
    with caplog.at_level(logging.WARNING, "zipvl_compile"):
        assert machine(device, torch.bfloat16) == known
        another_process()
        monkeypatch.setattr(module, "_measure", lambda *given: dataclasses.replace(CPU, site=1.0))
        assert machine(device, torch.bfloat16) == known, "now it would work, but another process may have this"
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert str(device) in caplog.text and str(error).splitlines()[0] in caplog.text and "Tried" not in caplog.text
    assert "measuring failed" in module.speed(device, torch.bfloat16).origin
    assert module.renewed(device, torch.bfloat16).machine.site == 1


def test_a_full_gpu_is_not_measured_at_all(monkeypatch, caplog, free, gpu):
    free(100 << 20)
    monkeypatch.setattr(module, "_measure", fails_with(AssertionError("measured")))
    assert machine(GPU, torch.bfloat16) == H100
    assert "105 MB are free" in caplog.text


def test_a_gpu_that_is_not_there_is_some_gpu():
    if not torch.cuda.is_available():
        assert machine(GPU, torch.bfloat16) == scaled(GENERIC, torch.bfloat16)


def test_a_model_compiles_where_measuring_fails(monkeypatch):
    monkeypatch.setattr(module, "_measure", fails_with(torch.OutOfMemoryError("full")))
    torch._dynamo.reset()
    with torch.no_grad():
        out = compiled(min_tokens=None)(**inputs(text=20))
    assert out.logits.isfinite().all()


def test_a_sparse_attention_from_scores_to_output_keeps_its_shape():
    q, k, v = torch.randn(3, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    assert sparse_prefill_attention(q, k, v, keep_ratio=0.5).shape == (1, 2, 40, 8)
