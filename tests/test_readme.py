"""README and pages say what the code and the results files say, and their links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import sys

import graph_example
import pytest
import tables
from support import pages
from support.pages import PAGES, ROOT

import zipvl_compile
from zipvl_compile.evaluate.variants import OF_PRESETS
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.pipeline import PIPELINE

RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "docs"))

import hooks  # noqa: E402


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", tables.PAGES)
def test_every_figure_comes_from_the_results_files(page):
    text = text_of(page)
    if "<!-- graph -->" in text and graph_example.versions() not in text:
        pytest.skip("the nodes of the graph in this page have the names of other releases")
    assert tables.render(text) == text, "run `python benchmarks/tables.py`"


def test_every_table_is_shown_once():
    text = "".join(map(text_of, tables.PAGES))
    assert sorted(re.findall(r"<!-- (?!end)(\w+) -->", text)) == sorted(tables.TABLES)


# ---- Links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    """Without a look at the network: those that name a host are only read."""
    for link in pages.links(page):
        if re.match(r"https?://[\w.-]+\.\w+", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in pages.anchors(str(target.resolve().relative_to(ROOT))), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_links_of_the_site_stay_on_it(page):
    """A page is on the site, figures and tables are put there; any other file of the repository is not."""
    files = {link.partition("#")[0] for link in pages.links(page) if "://" not in link} - {""}
    assert [one for one in files if (ROOT / "docs" / one).resolve().parent not in (ROOT / "docs", RESULTS)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_the_site_fills_in_parts_of_the_readme(page):
    filled = hooks.on_page_markdown(text_of(page))
    assert not re.search(r"<!-- (table|section) |\]\((docs|\.\./benchmarks)/", filled)
    for name in re.findall(r"<!-- table (\w+) of README.md -->", text_of(page)):
        assert tables.TABLES[name]() in filled


def test_a_part_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="expected a table nothing in"):
        hooks.with_parts("<!-- table nothing of README.md -->")


def test_every_page_is_in_the_navigation_and_in_the_readme():
    listed = set(re.findall(r"^  - .+: (\S+\.md)$", text_of("mkdocs.yml"), flags=re.M))
    named = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert listed == named
    assert named - {"api.md"} <= {link.removeprefix("docs/") for link in pages.links("README.md")}


# ---- What the code says


def options_of(page: str, heading: str) -> dict[str, str]:
    """Return the options that the table below a heading lists, with their defaults."""
    section = text_of(page).split(f"## {heading}\n")[1].split("\n## ")[0]
    listed = {}
    for names, defaults in re.findall(r"^\| (`.*?) \| (.*?) \|", section, flags=re.M):
        listed |= dict(zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True))
    return {name: value.strip('`"') for name, value in listed.items()}


def defaults() -> dict[str, str]:
    default = ZipVLOptions.parse()
    return {field.name: str(getattr(default, field.name)) for field in dataclasses.fields(ZipVLOptions)}


def test_the_options_table_lists_every_option_with_its_default():
    assert options_of("docs/presets.md", "Every option") == defaults()


def test_the_readme_lists_some_of_them():
    listed = options_of("README.md", "Options")
    assert {"preset", "tau", "min_tokens"} < listed.keys()
    assert listed.items() <= defaults().items()


def test_the_presets_are_listed():
    table = text_of("docs/presets.md").split("\n## ")[0]
    assert set(re.findall(r'^\| `"(\w+)"` \|', table, flags=re.M)) == OF_PRESETS.keys()


def test_the_pass_table_lists_every_pass_of_the_pipeline():
    listed = re.findall(r"^\| `passes/(\w+)\.py`", text_of("docs/how-it-works.md"), flags=re.M)
    assert listed == [row.name for row in PIPELINE]


def test_troubleshooting_quotes_what_the_package_says():
    """The first column of the table of warnings: each stands in the code, where lines of a text are joined."""
    said = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in (ROOT / "zipvl_compile").rglob("*.py"))
    said += "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in (ROOT / "passes").rglob("*.py"))
    quoted = re.findall(r"^\| `(.+?)` \|", text_of("docs/troubleshooting.md"), flags=re.M)
    assert len(quoted) >= 10
    assert [text for text in quoted if text not in said] == []


def test_the_reference_shows_every_public_name():
    assert "\n::: zipvl_compile\n" in text_of("docs/api.md")
    assert all(getattr(zipvl_compile, name).__doc__ for name in zipvl_compile.__all__ if not name.startswith("_"))
