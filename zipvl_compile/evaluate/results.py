"""Results as JSON lines, one measurement each, and as a table of the newest ones."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BENCH = "frontier"
LINES, ITEMS, TABLE = "frontier.jsonl", "frontier_items.jsonl", "frontier.csv"
Rows = dict[tuple[str, str], dict[str, float]]
"""`metric -> value` by case and variant."""


@cache
def environment(root: Path) -> dict[str, str]:
    """Return what a measurement depends on: hardware, versions, the commit of the checkout at `root`, the date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "triton": version("triton"),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def append(folder: Path, case: str, variant: str, metrics: Mapping[str, tuple[float, str]]) -> None:
    """Append measurements, `metric -> (value, unit)`, a line each, to the results in a folder."""
    base = {"bench": BENCH, "case": case, "variant": variant}
    values = ({"metric": m, "value": rounded(number), "unit": unit} for m, (number, unit) in metrics.items())
    _append(folder / LINES, (base | value | environment(Path(__file__).parent) for value in values))


def append_items(folder: Path, case: str, variant: str, items: Iterable[Mapping[str, Any]]) -> None:
    """Append what every document or question gave, a line each, so that variants can be paired with each other."""
    about = environment(Path(__file__).parent)
    when = {"commit": about["commit"], "date": about["date"]}
    _append(folder / ITEMS, ({"case": case, "variant": variant, **item, **when} for item in items))


def _append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append lines in one write: several processes may share a folder."""
    with path.open("ab", buffering=0) as out:
        out.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def rounded(number: float) -> float:
    """Return a number with six digits, or a whole one where it is large.

    Raises:
        ValueError: no number, or infinity.
    """
    if not math.isfinite(number):
        raise ValueError(f"value: expected a finite number, got {number}. The model returned no probabilities.")
    return float(f"{number:.6g}") if abs(number) < 1e6 else round(number)


def newest(folder: Path) -> Rows:
    """Return the newest value of every metric in a folder, in the order in which cases and variants first came."""
    rows: Rows = {}
    with (folder / LINES).open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            rows.setdefault((line["case"], line["variant"]), {})[line["metric"]] = line["value"]
    return rows


def write_table(folder: Path, rows: Rows) -> Path:
    """Write one line per case and variant, one column per metric; return the path."""
    metrics = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, ["case", "variant", *metrics], restval="")
        table.writeheader()
        table.writerows({"case": case, "variant": variant, **values} for (case, variant), values in rows.items())
    return folder / TABLE
