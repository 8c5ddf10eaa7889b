"""The README says what the code and the results files say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import tables

from zipvl_compile.options import ZipVLOptions
from zipvl_compile.pipeline import PIPELINE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_figure_comes_from_the_results_files():
    assert tables.render(README) == README, "run `python benchmarks/tables.py`"
    assert "x |" in tables.speed() and "% |" in tables.frontier()


def test_the_options_table_lists_every_option_with_its_default():
    section = README.split("## Options")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, flags=re.M)
    listed = {}
    for names, defaults in rows:
        values = defaults.split(", ")
        listed |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    default = ZipVLOptions.parse()
    expected = {f.name: getattr(default, f.name) for f in dataclasses.fields(ZipVLOptions)}
    assert {name: value.strip('`"') for name, value in listed.items()} == {k: str(v) for k, v in expected.items()}


def test_the_pass_table_lists_every_pass_of_the_pipeline():
    listed = re.findall(r"^\| `passes/(\w+)\.py`", README, flags=re.M)
    assert listed == [row.name for row in PIPELINE]
