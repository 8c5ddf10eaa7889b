"""`make gpu` begins with what is wanted most, and every part of it is a target of its own with an end."""

import json
import re
from pathlib import Path

import gpu_parts
import newest
import pytest

MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text()


def line(bench, metric, date):
    return json.dumps({"bench": bench, "case": "", "variant": "", "metric": metric, "value": 1, "date": date})


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Return a function that writes the lines of a results file."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for module in (gpu_parts, newest):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return lambda file, *lines: (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")


def test_parts_without_figures_come_before_those_with_old_ones(results):
    assert gpu_parts.order() == ["gpu-tests", *gpu_parts.PARTS]
    kernels = [line(bench, "time", "2026-03-01") for bench in gpu_parts.PARTS["gpu-kernels"][1]]
    decode = line("decode", "static", "2026-01-01")
    results("gpu", decode, line("prefill", "skipped_layers", "2026-02-01"), *kernels)
    assert gpu_parts.order() == ["gpu-tests", "gpu-speed", "gpu-decode", "gpu-prefill", "gpu-kernels"]
    results("gpu", decode, line("prefill", "dense", "2026-02-01"), *kernels[1:])  # without what is new in them
    assert gpu_parts.order() == ["gpu-tests", "gpu-prefill", "gpu-kernels", "gpu-speed", "gpu-decode"]


def test_every_part_is_a_target_that_ends_after_three_minutes():
    for part in ["gpu-tests", *gpu_parts.PARTS]:
        recipe = re.search(rf"^{part}: .*\n\t(.*)$", MAKEFILE, flags=re.M)
        assert recipe and recipe[1].startswith("$(THREE_MINUTES)"), part
    assert "THREE_MINUTES := timeout --signal=INT 180" in MAKEFILE
