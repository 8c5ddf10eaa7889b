"""Try releases of Python, PyTorch and transformers, each combination in an environment of its own: `make matrix`.

Each gets the wheel of `make dist` and runs a quick part of the tests from the unpacked source distribution, so that
what is tested is what is installed. An environment is deleted when done: with a CUDA build of PyTorch it takes 5 GB.
Results go to benchmarks/results/matrix.jsonl and, as a table, matrix.md; what is not tried again keeps its row.

    python benchmarks/matrix.py [PYTHON/TORCH/TRANSFORMERS ...] [--dist build/dist] [--keep]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORK, RESULTS = ROOT / "build" / "matrix", ROOT / "benchmarks" / "results"
#: Ends of the ranges in pyproject.toml and a release between; "" is the newest that they allow.
COMBINATIONS = ("3.10/2.11/5.17", "3.11/2.11/", "3.11/2.12/", "3.12/2.13/5.17", "3.11/2.13/", "3.13/2.13/")
FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
QUICK = (
    "tests/kernels/common",
    "tests/zipvl_compile/test_backend.py",
    "tests/zipvl_compile/test_dynamo.py",
    "tests/zipvl_compile/test_entry_point.py",
    "tests/scenarios/test_generate.py::test_every_way_to_generate",
    "tests/scenarios/test_static_decode.py::test_one_graph_decodes_all_of_a_generate",
    *(f"tests/models/test_families.py::test_everything[{family}]" for family in FAMILIES),
)
MOST_SECONDS = 3000
#: What is known of failures, by what their text holds.
KNOWN = {
    "CppCompileError": "A defect of Inductor on CPUs before PyTorch 2.13, with plain Inductor as with zipvl: it checks "
    "indices by code that does not compile. `torch._inductor.config.assert_indirect_indexing = False` leaves them out.",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("combinations", nargs="*", default=COMBINATIONS)
    arguments.add_argument("--dist", type=Path, default=ROOT / "build" / "dist")
    arguments.add_argument("--keep", action="store_true", help="keep the environments")
    given = arguments.parse_args()
    wheel, source = (next(given.dist.glob(pattern)).resolve() for pattern in ("*.whl", "*.tar.gz"))
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(source) as archive:
        archive.extractall(WORK / "source", filter="data")
    for combination in given.combinations:
        print(combination, flush=True)
        row = tried(combination, wheel, next((WORK / "source").iterdir()), given.keep)
        print(json.dumps(row, indent=1), flush=True)
        with (RESULTS / "matrix.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        (RESULTS / "matrix.md").write_text(page())


def tried(combination: str, wheel: Path, source: Path, keep: bool) -> dict[str, Any]:
    """Return the row of one combination: what was installed, and what passed, failed and was skipped."""
    python, torch, transformers = combination.split("/")
    row = {"combination": combination, "date": f"{datetime.date.today()}", "platform": platform.platform()}
    row["wheel"] = wheel.name.split("-")[1]
    interpreter = shutil.which(f"python{python}")
    if interpreter is None or subprocess.run([interpreter, "--version"], capture_output=True).returncode:
        return row | {"error": f"no python{python} here"}
    where = WORK / combination.strip("/").replace("/", "-")
    shutil.rmtree(where, ignore_errors=True)
    start = time.monotonic()
    try:
        subprocess.run([interpreter, "-m", "venv", str(where)], check=True)
        wanted = [
            str(wheel),
            f"torch=={torch}.*",
            f"transformers=={transformers}.*" if transformers else "transformers",
        ]
        wanted += ["pytest", "pytest-xdist", "hypothesis", "pillow"]
        installed = call([where / "bin/python", "-m", "pip", "install", "-q", *wanted], source)
        if installed.returncode:
            return row | {"error": "pip: " + installed.stderr.strip().splitlines()[-1]}
        listed = call([where / "bin/python", "-m", "pip", "list", "--format", "json"], source).stdout
        names = ("torch", "transformers", "triton", "numpy")
        row["versions"] = {p["name"]: p["version"] for p in json.loads(listed) if p["name"] in names}
        row["python"] = call([where / "bin/python", "-V"], source).stdout.split()[1]
        row["install_s"] = round(time.monotonic() - start)
        tiny = call([where / "bin/python", "tests/release/compile_tiny.py"], source)
        row["inductor"] = "passed" if tiny.returncode == 0 else cause(tiny.stderr)
        report = where / "report.xml"
        call([where / "bin/pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *QUICK], source)
        row |= counted(report)
        return row | {"tests_s": round(time.monotonic() - start) - row["install_s"]}
    except subprocess.TimeoutExpired:
        return row | {"error": f"not done after {MOST_SECONDS} s"}
    finally:
        if not keep:
            shutil.rmtree(where, ignore_errors=True)


def call(command: list[Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command quietly, without the caller's packages and with no compiled code of another release."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"), "OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=os.environ | caches, capture_output=True, text=True,
        timeout=MOST_SECONDS,
    )  # fmt: skip


def cause(text: str) -> str:
    """Return the last line of an error that says something."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*(\w+\.)*\w*(Error|Exception|Failed)\b", line)]
    return (lines or text.strip().splitlines() or ["no output"])[-1][:300]


def counted(report: Path) -> dict[str, Any]:
    """Return how many tests passed, and which failed or were skipped, with the reasons."""
    if not report.exists():
        return {"error": "pytest wrote no report"}
    passed, failed, skipped = 0, {}, Counter[str]()
    for case in ET.parse(report).iter("testcase"):
        bad = next((child for tag in ("failure", "error") for child in case.findall(tag)), None)
        left = case.find("skipped")
        if bad is not None:
            text = re.sub(r"(?m)^E +", "", f"{bad.get('message')}\n{bad.text}")
            failed[f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}"] = cause(text)
        elif left is not None:
            skipped[left.get("message") or ""] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": dict(skipped)}


def page() -> str:
    """Return the newest row of every combination as a Markdown page."""
    rows = {row["combination"]: row for row in map(json.loads, (RESULTS / "matrix.jsonl").read_text().splitlines())}
    table = [
        "# Releases that were tried", "",
        "`make matrix`: the wheel, and a quick part of the tests, each in a clean environment.", "",
        "| Python | torch | transformers | triton | Inductor, default options | passed | failed | skipped |",
        "|" + "---|" * 8,
    ]  # fmt: skip
    notes = []
    for combination, row in sorted(rows.items()):
        if "error" in row:
            python, torch, transformers = combination.split("/")
            table.append(f"| {python} | {torch} | {transformers or 'newest'} | | not tried: {row['error']} | | | |")
            continue
        found, inductor = row["versions"], row["inductor"]
        name = f"Python {row['python']}, torch {found['torch']}, transformers {found['transformers']}"
        if inductor != "passed":
            notes.append(f"- {name}, by Inductor: `{inductor}`")
            inductor = "fails, see below"
        notes += [f"- {name}: {test}: `{why}`" for test, why in row["failed"].items()]
        skipped = "; ".join(f"{count}: {why}" for why, count in row["skipped"].items())
        cells = [row["python"], found["torch"], found["transformers"], found.get("triton", ""), inductor]
        table.append("| " + " | ".join([*cells, str(row["passed"]), str(len(row["failed"])), skipped]) + " |")
    last = max(rows.values(), key=lambda row: row["date"])
    notes += [""] * bool(notes)
    notes += [f"{part}: {text}\n" for part, text in KNOWN.items() if any(part in note for note in notes)]
    return "\n".join([*table, "", *notes, f"zipvl-compile {last['wheel']}, {last['platform']}, {last['date']}.", ""])


if __name__ == "__main__":
    main()
