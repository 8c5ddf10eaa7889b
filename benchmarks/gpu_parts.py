"""In which order `make gpu` runs its parts: the tests, and then those whose committed figures are missing or oldest.

    python benchmarks/gpu_parts.py        gpu-tests gpu-decode gpu-kernels ...

Time on a GPU is short, so that what is wanted most comes first.
"""

from __future__ import annotations

from newest import ROOT, latest

#: What each part measures: the results file, and benchmarks of it with a metric that only the newest form of each has.
PARTS = {
    "gpu-decode": ("gpu", {"decode": "static"}),
    "gpu-prefill": ("gpu", {"prefill": "skipped_layers"}),
    "gpu-kernels": ("gpu", {"sparse_attention": "time", "window_attention": "time", "selection": "time",
                            "decode_attention": "time"}),
    "gpu-speed": ("gpu_speed", {"prefill": "speedup"}),
}  # fmt: skip


def age(part: str) -> str:
    """Return the date of the oldest figures of a part; an empty string, which sorts first, where some are missing."""
    file, wanted = PARTS[part]
    if not (ROOT / "benchmarks" / "results" / f"{file}.jsonl").exists():
        return ""
    dates = dict.fromkeys(wanted, "")
    for (bench, _, _), metrics in latest(file).items():
        if bench in wanted and wanted[bench] in metrics:
            dates[bench] = max(dates[bench], metrics[wanted[bench]]["date"])
    return min(dates.values())


def order() -> list[str]:
    """Return the parts, the most wanted first."""
    return ["gpu-tests", *sorted(PARTS, key=age)]


if __name__ == "__main__":
    print(*order())
