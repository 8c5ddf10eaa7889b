"""What the site shows of files outside of docs/: parts of the README, figures and tables of benchmarks/results.

In a page, `<!-- section NAME of README.md -->` is replaced by that section, `<!-- table NAME of README.md -->` by that
generated table. On GitHub, where nothing is replaced, such a line is invisible.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"


def on_files(files: Any, config: Any) -> Any:
    """Add figures and tables."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / RESULTS).glob("*.*")):
        if path.suffix in (".png", ".md") and path.name != "README.md":
            files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the parts, and lead links to where pages and results are on the site."""
    return with_parts(markdown).replace(f"](../{RESULTS}/", f"]({RESULTS}/").replace("](../../docs/", "](../../")


def with_parts(markdown: str) -> str:
    """Return a page of docs/ with parts of other files filled in.

    Raises:
        ValueError: there is no such part.
    """
    return re.sub(r"<!-- (section|table) (.+) of (\S+) -->", lambda found: _part(*found.groups()), markdown)


def _part(kind: str, name: str, path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    name = re.escape(name)
    pattern = rf"^## {name}\n(.*?)(?=^## |\Z)" if kind == "section" else rf"<!-- {name} -->\n(.*?)<!-- end -->"
    found = re.search(pattern, text, flags=re.S | re.M)
    if found is None:
        raise ValueError(f"expected a {kind} {name} in {path}, got none")
    return found[1].strip().replace("](docs/", "](")
