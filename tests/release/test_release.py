"""What is released: `make test-dist` builds it, and installs it where nothing else is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from support import pages
from support.source_tree import PACKAGE, ROOT, module_name, sources

import zipvl_compile
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT

HERE = Path(__file__).parent
DIST = ROOT / "build" / "dist"
# What needs no compiler, beside what reads the files of the repository.
QUICK = ("tests/kernels/test_select_tokens.py", "tests/test_layout.py", "tests/test_readme.py")


def run(*command: object, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command where no setting of the tests' own process reaches it, but for these."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON", "PYTHON"))}
    given = [str(part) for part in command]
    return subprocess.run(given, cwd=folder, env=own | settings, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="session")
def wheel() -> Path:
    return next(DIST.glob("*.whl"))


@pytest.fixture(scope="session")
def python(wheel) -> Path:
    """Return the Python of an environment that holds the wheel and what it requires."""
    folder = DIST / "venv"
    assert run(sys.executable, "-m", "venv", "--clear", folder, folder=ROOT).returncode == 0
    installed = run(folder / "bin" / "python", "-m", "pip", "install", "-q", wheel, folder=ROOT)
    assert installed.returncode == 0, installed.stderr
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def command_line(wheel, python) -> Path:
    """Return a folder of what the extra `cli` requires, beside the environment that has none of it."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    required = re.findall(r"(?m)^Requires-Dist: ([^;\n]+); extra == .cli.$", metadata)
    folder = DIST / "command-line"
    installed = run(python, "-m", "pip", "install", "-q", "--target", folder, "--upgrade", *required, folder=ROOT)
    assert required and installed.returncode == 0, installed.stderr
    return folder


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> Path:
    """Return the folder of the source distribution."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(next(DIST.glob("*.tar.gz"))) as archive:
        assert [one.name for one in archive if one.issym() or one.islnk()] == []
        archive.extractall(folder)
    return next(folder.iterdir())


def test_the_changelog_begins_with_the_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == f"## {zipvl_compile.__version__}"


def test_every_public_name_is_among_the_typed_uses():
    text = (HERE / "typed_use.py").read_text()
    assert [name for name in zipvl_compile.__all__ if f"zipvl_compile.{name}" not in text] == []


@pytest.mark.dist
def test_the_wheel_holds_every_file_of_the_package_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    expected = {}
    for path in sources():
        module = module_name(path).replace(".", "/")
        expected[f"{module}/__init__.py" if path.name == "__init__.py" else f"{module}.py"] = path.read_bytes()
    for path in [ROOT / PACKAGE / "py.typed", *(ROOT / PACKAGE / "demo" / "tiny_lvlm").glob("checkpoint*/*")]:
        expected[str(path.relative_to(ROOT))] = path.read_bytes()
    assert sorted(held) == sorted(expected) and held == expected
    assert wheel.stat().st_size < 15e6


@pytest.mark.dist
def test_a_model_compiles_by_the_name_of_the_backend_alone(python, tmp_path):
    done = run(python, HERE / "compile_tiny.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["LLaVA", "Llama"]


@pytest.mark.dist
@pytest.mark.parametrize("command", ["demo", "eval", "explain MODEL", "calibrate MODEL --data ."])
def test_without_extras_a_command_says_what_to_install(command, python, tmp_path):
    done = run(python.parent / "zipvl", *command.split(), folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    line = r"zipvl: the command line needs \w+, which is not installed: pip install 'zipvl-compile\[demo\]'\n"
    assert re.fullmatch(line, done.stderr), done.stderr


@pytest.mark.dist
def test_the_python_blocks_of_the_readme_run(python, command_line, tmp_path):
    done = run(python, HERE / "run_readme.py", ROOT / "README.md", folder=tmp_path, PYTHONPATH=str(command_line))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("ran ") == len(pages.blocks("README.md", "python"))


def readme_commands() -> list[str]:
    lines = [line for block in pages.blocks("README.md", "bash") for line in block.code.splitlines()]
    return [line for line in lines if line.startswith("zipvl ")]


@pytest.mark.dist
@pytest.mark.parametrize("line", readme_commands())
def test_the_commands_of_the_readme_run(line, python, command_line, tmp_path):
    for name in ("photo", "a", "b"):
        Image.effect_noise((224, 224), 60).convert("RGB").save(tmp_path / f"{name}.jpg")
    words = [str(CHECKPOINT) if word == "MODEL" else word for word in shlex.split(line, comments=True)]
    settings = {"PYTHONPATH": str(command_line), "ZIPVL_CACHE_DIR": str(tmp_path)}
    done = run(python.parent / words[0], *words[1:], folder=tmp_path, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()


CHECKERS = {
    "mypy": ("mypy", "--strict", "--config-file=", "--python-executable"),
    "pyright": ("pyright", "--pythonpath"),
}


@pytest.mark.dist
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_code_passes_the_type_checkers(checker, python, tmp_path):
    module, *options = CHECKERS[checker]
    (tmp_path / "use.py").write_text((HERE / "typed_use.py").read_text())
    done = run(sys.executable, "-m", module, *options, python, "use.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = (tmp_path / "use.py").read_text().replace("fork(out.cache), 16", 'fork(out.cache), "16"')
    (tmp_path / "use.py").write_text(wrong)
    done = run(sys.executable, "-m", module, *options, python, "use.py", folder=tmp_path)
    assert done.returncode == 1 and '"int"' in done.stdout


@pytest.mark.dist
def test_the_tests_run_from_the_source_distribution(unpacked):
    collected = run(sys.executable, "-m", "pytest", "-q", "--collect-only", folder=unpacked)
    assert collected.returncode == 0, re.findall("(?m)^E.*", collected.stdout) or collected.stderr
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK, folder=unpacked)
    assert done.returncode == 0, done.stdout[-2000:]
    where = run(sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", folder=unpacked)
    assert where.stdout.strip() == str(unpacked / PACKAGE / "__init__.py")
