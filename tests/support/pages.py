"""README.md, its neighbours and docs/*.md as readers find them: code blocks, code in the text, links, headings."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
_DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *_DOCS)
#: The comment before a block that no test runs, with the reason.
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its code, and why no test runs it, or an empty string."""

    page: str
    line: int
    language: str
    code: str
    not_run: str


@functools.cache
def tokens(page: str) -> tuple[Token, ...]:
    """Return the Markdown of a page."""
    return tuple(MarkdownIt("gfm-like", {"linkify": False}).parse((ROOT / page).read_text(encoding="utf-8")))


def blocks(page: str, language: str = "") -> list[Block]:
    """Return the fenced blocks of a page, of one language or all."""
    found, before = [], ""
    for token in tokens(page):
        if token.type == "fence":
            reason = NOT_RUN.search(before)
            line = (token.map or [0])[0] + 1
            found.append(Block(page, line, token.info.strip(), token.content, reason[1] if reason else ""))
        before = token.content if token.type == "html_block" else ""
    return [one for one in found if language in ("", one.language)]


def _inline(page: str) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or ()


def code_in_text(page: str) -> list[str]:
    """Return what stands between backticks in the text of a page."""
    return [token.content for token in _inline(page) if token.type == "code_inline"]


def links(page: str) -> list[str]:
    """Return where links and pictures of a page lead."""
    leading = [token.attrs for token in _inline(page) if token.tag in ("a", "img") and token.attrs]
    return [str(one.get("href") or one.get("src")) for one in leading]


def anchors(page: str) -> set[str]:
    """Return the anchors of the headings of a page, where GitHub and the site give them the same one."""
    found, opened = set(), False
    for token in tokens(page):
        if opened:
            text = "".join(child.content for child in token.children or ())
            words = re.sub(r"[^\w\s-]", "", text.lower()).strip()
            if re.sub(r"\s", "-", words) == re.sub(r"[-\s]+", "-", words):
                found.add(re.sub(r"\s", "-", words))
        opened = token.type == "heading_open"
    return found
