"""The newest measurements of a results file, and where they are from."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent


def latest(file: str) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Return the newest measurement of each metric: `{(bench, case, variant): {metric: line}}`, in file order."""
    path = ROOT / "benchmarks" / "results" / f"{file}.jsonl"
    found: dict[tuple[str, str, str], dict[str, dict]] = defaultdict(dict)
    for text in path.read_text().splitlines():
        line = json.loads(text)
        found[line["bench"], line["case"], line["variant"]][line["metric"]] = line
    return found


def source(rows: dict) -> str:
    """Return where the figures come from, as one line."""
    line = next(iter(next(iter(rows.values())).values()))
    commits = list(dict.fromkeys(line["commit"] for metrics in rows.values() for line in metrics.values()))
    return (
        f"{line['hardware']}; torch {line['torch']}, transformers {line['transformers']}; {line['date']}, "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}."
    )
