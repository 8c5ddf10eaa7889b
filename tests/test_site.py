"""The site is built without a warning, and shows every table, block and item of the pages; `make docs` runs this."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter

import pytest
from markdown_it import MarkdownIt
from support.pages import PAGES, ROOT

config = pytest.importorskip("mkdocs.config", reason="the site needs the extra `docs`: `make docs` installs it")

sys.path.append(str(ROOT / "docs"))

import hooks  # noqa: E402

ON_SITE = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the built site and what was warned of."""
    from mkdocs.commands.build import build

    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    folder = tmp_path_factory.mktemp("site")
    build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    logging.getLogger("mkdocs").removeHandler(handler)
    return folder, warned


def test_nothing_is_warned_of(site):
    assert site[1] == []


@pytest.mark.parametrize("page", ON_SITE)
def test_a_page_shows_what_github_shows(site, page):
    """Python-Markdown, which makes the site, wants more blanks and blank lines than GitHub does."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(
        hooks.on_page_markdown((ROOT / "docs" / page).read_text())
    )
    kinds = Counter(token.type for token in tokens)
    html = (site[0] / page.replace(".md", ".html")).read_text().split("<article")[1].split("</article>")[0]
    made = {"table_open": "<table>", "fence": '<div class="(?:language-\\w+ )?highlight', "list_item_open": "<li>"}
    if page != "api.md":
        assert {kind: len(re.findall(tag, html)) for kind, tag in made.items()} == {kind: kinds[kind] for kind in made}
    text = re.sub("<[^>]+>", "", re.sub("<code.*?</code>", "", html, flags=re.S))
    assert [mark for mark in ("```", "|---", "](", "**", "\\|") if mark in text] == []


def test_the_reference_shows_every_public_name(site):
    import zipvl_compile

    html = (site[0] / "api.html").read_text()
    names = [name for name in zipvl_compile.__all__ if not name.startswith("_")]
    assert [name for name in names if f'id="zipvl_compile.{name}"' not in html] == []


def test_the_figures_are_on_the_site(site):
    shown = {name for page in ON_SITE for name in re.findall(r'src="([^"]+\.png)"', _html(site, page))}
    assert len(shown) >= 3 and all((site[0] / name).exists() for name in shown)


def _html(site, page: str) -> str:
    return (site[0] / page.replace(".md", ".html")).read_text()
