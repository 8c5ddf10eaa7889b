"""What a package index shows: links of the README that lead somewhere there."""

import re
import runpy
import subprocess
import sys
from email.parser import Parser

import pytest
from support.source_tree import ROOT

import zipvl_compile

URL = "https://example.org/team/zipvl-compile"
SETUP = ROOT / "setup.py"


@pytest.fixture(scope="module")
def absolute():
    return runpy.run_path(str(SETUP))["absolute"]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[Limits](docs/limits.md)", "[Limits](P/docs/limits.md)"),
        ("![Kept](benchmarks/results/demo.png)", "![Kept](F/benchmarks/results/demo.png)"),
        ("[A](a.md), [B](b.md#part)", "[A](P/a.md), [B](P/b.md#part)"),
        ("[Part](#part) [Paper](https://arxiv.org/abs/2410.08584)",) * 2,
    ],
    ids=["page", "image", "two", "elsewhere"],
)
def test_links(absolute, link, expected):
    assert absolute(link, "P/", "F/") == expected


@pytest.mark.parametrize("url", ["", URL, URL + "/"], ids=["unknown", "known", "with a slash"])
def test_every_link_of_the_description(url, monkeypatch):
    monkeypatch.setenv("REPOSITORY_URL", url)
    given = runpy.run_path(str(SETUP))["shown"]()
    readme = (ROOT / "README.md").read_text()
    if not url:
        assert given["long_description"] == readme and "project_urls" not in given
        return
    here = re.findall(r"\]\(((?!https?:|#)[^)\s]+)\)", readme)
    led = re.findall(
        rf"\]\({URL}/(?:blob|raw)/v{re.escape(zipvl_compile.__version__)}/([^)\s]+)\)", given["long_description"]
    )
    assert led == here and all((ROOT / path.partition("#")[0]).exists() for path in led)
    assert all(address.startswith(URL) for address in given["project_urls"].values())


@pytest.mark.dist
def test_the_metadata_of_a_release(tmp_path, monkeypatch):
    monkeypatch.setenv("REPOSITORY_URL", URL)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    unpacked = tmp_path / "unpacked"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", next(tmp_path.glob("*.whl")), unpacked], check=True)
    metadata = Parser().parsestr(next(unpacked.glob("*.dist-info/METADATA")).read_text())
    assert f"Repository, {URL}" in metadata.get_all("Project-URL")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert f"]({URL}/blob/v{zipvl_compile.__version__}/docs/limits.md)" in metadata.get_payload()
