"""What pyproject.toml cannot say: a package index shows the README without the files that its links lead to.

REPOSITORY_URL, of the repository that a release is built from, makes them absolute; without it they stay as they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(?P<start>(?P<image>!?)\[[^\]]*\]\()(?P<target>[^)\s]+)\)")
ELSEWHERE = ("#", "http://", "https://", "mailto:")
PAGES = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}


def absolute(text: str, pages: str, files: str) -> str:
    """Return Markdown whose links to files of the repository start with `pages`, and those to images with `files`."""

    def link(found: re.Match[str]) -> str:
        start = "" if found["target"].startswith(ELSEWHERE) else files if found["image"] else pages
        return f"{found['start']}{start}{found['target']})"

    return LINK.sub(link, text)


def shown() -> dict[str, object]:
    """Return what a package index shows of the project."""
    text, repository = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        os.environ.get("REPOSITORY_URL", "").rstrip("/"),
    )
    given: dict[str, object] = {"long_description_content_type": "text/markdown"}
    if not repository:
        return {**given, "long_description": text}
    numbered = re.search(r'__version__ = "(.+)"', (ROOT / "zipvl_compile" / "version.py").read_text(encoding="utf-8"))
    assert numbered is not None
    pages, files = (f"{repository}/{kind}/v{numbered[1]}/" for kind in ("blob", "raw"))
    addresses = {"Repository": repository} | {name: pages + path for name, path in PAGES.items()}
    return {**given, "long_description": absolute(text, pages, files), "project_urls": addresses}


if __name__ == "__main__":
    setup(**shown())
