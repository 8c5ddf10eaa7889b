"""The version is written once, and the package shows what it promises."""

from importlib.metadata import version

import zipvl_compile
from zipvl_compile.version import __version__


def test_the_version_is_that_of_the_distribution():
    assert zipvl_compile.__version__ == __version__ == version("zipvl-compile")


def test_every_public_name_is_there():
    assert all(hasattr(zipvl_compile, name) for name in zipvl_compile.__all__)
    assert {"compile", "explain", "kept_tokens", "recent_reports"} <= set(zipvl_compile.__all__)
