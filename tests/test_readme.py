"""README and pages of figures say what the code and the results files say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tables

from zipvl_compile.options import ZipVLOptions
from zipvl_compile.pipeline import PIPELINE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", tables.PAGES)
def test_every_figure_comes_from_the_results_files(page):
    text = (ROOT / page).read_text()
    assert tables.render(text) == text, "run `python benchmarks/tables.py`"
    assert " |" in text.split("<!-- ")[1]


def test_every_table_is_shown_once():
    text = "".join((ROOT / page).read_text() for page in tables.PAGES)
    assert sorted(re.findall(r"<!-- (?!end)(\w+) -->", text)) == sorted(tables.TABLES)


@pytest.mark.parametrize("page", tables.PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert links and all(((ROOT / page).parent / link).exists() for link in links)


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
