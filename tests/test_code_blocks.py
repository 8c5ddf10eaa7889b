"""Every code block of README.md and docs/*.md runs, and every command in them exists.

A block that needs another machine is marked in its page, by `<!-- not run: reason -->` on the line before.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support import pages
from support.pages import PAGES, ROOT, Block
from transformers import AutoModelForImageTextToText, AutoProcessor

import zipvl_compile
from zipvl_compile import backend, pipeline
from zipvl_compile.cache.hf_names import CACHE_NAME
from zipvl_compile.demo.cli import app
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.evaluate import questions_for_demo
from zipvl_compile.options import ZipVLOptions

NOT_RUN = {"docs/scale.md": 2}
RUN = [page for page in PAGES if pages.blocks(page, "python")]
COMMANDS = [block for page in PAGES for block in pages.blocks(page, "bash") if not block.not_run]
LANGUAGES = {"python", "bash", "text"}
USERS_SCRIPT = "answer.py"


# ---- Python


@functools.cache
def _bundled() -> tuple[Any, Any]:
    """Return the small bundled model, cut to one layer, which compiles in a third of the time, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    decoder, tower = model.model.language_model, model.model.vision_tower
    decoder.layers, decoder.config.num_hidden_layers = decoder.layers[:1], 1
    tower.encoder.layers, tower.config.num_hidden_layers = tower.encoder.layers[:1], 1
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture
def reader(monkeypatch):
    """What the reader of a page has: a model, a picture, a prompt. Nothing is compiled further, no prompt is short."""
    torch.compiler.reset()
    monkeypatch.setattr(backend, "compile_with_inductor", lambda gm, *_: gm.forward)
    least = pipeline.least_tokens
    monkeypatch.setattr(pipeline, "least_tokens", lambda options: 0 if options.min_tokens is None else least(options))
    model, processor = _bundled()
    for auto, here in ((AutoModelForImageTextToText, model), (AutoProcessor, processor)):
        monkeypatch.setattr(auto, "from_pretrained", _without_hub(auto.from_pretrained, here))
    question = next(questions_for_demo(1, seed=0))
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    page = types.ModuleType("drop_dead_masks")  # the file that docs/extending.md writes is a module
    vars(page).update(
        torch=torch, copy=copy, zipvl_compile=zipvl_compile, AutoProcessor=AutoProcessor, image=question.image,
        AutoModelForImageTextToText=AutoModelForImageTextToText, model=copy.deepcopy(model), processor=processor,
        prompt=question.prompt, inputs=dict(inputs), questions=[torch.tensor([[9, 10]]), torch.tensor([[11, 12]])],
    )  # fmt: skip
    return page


def _without_hub(from_pretrained: Callable[..., Any], bundled: Any) -> Callable[..., Any]:
    """Return a `from_pretrained` that has the bundled model in the place of every one of the hub."""
    return lambda name: from_pretrained(name) if Path(name).exists() else copy.deepcopy(bundled)


def _run(page: types.ModuleType, block: Block) -> None:
    """Run a block, with the name that this release of transformers has for the cache; the pages have the newest."""
    code = re.sub(r"\bcache=", f"{CACHE_NAME}=", block.code).replace("out.cache", f"out.{CACHE_NAME}")
    exec(compile(code, f"{block.page}:{block.line}", "exec"), vars(page))


def _kept(out: Any) -> float:
    """Return which share of a prompt its layers keep."""
    layers = zipvl_compile.stats(out).layers
    return sum(one.kept for one in layers) / sum(one.prompt_length for one in layers)


def _of_extending(page: Any) -> bool:
    """Run the pass that the page adds at the end of the pipeline."""
    from graph_example import graphs

    with pytest.MonkeyPatch.context() as patch:
        row = pipeline.Row("drop_dead_masks", page.drop_dead_masks.apply, ("kept rows",), "no unread masks")
        patch.setattr(pipeline, "PIPELINE", (*pipeline.PIPELINE, row))
        graphs()
    report = zipvl_compile.recent_reports()[-1]
    return "drop_dead_masks" in report.seconds and not report.faults and page.POLICY.keep_ratio == 0.4


def _of_troubleshooting(page: Any) -> bool:
    off = torch.equal(page.out, page.plain.generate(**page.inputs))
    return page.same and off and page.held.bytes_peak > page.held.bytes_used and _kept(page.in_parts) < 0.5


#: What has to hold after the blocks of a page, beside that none fails.
HOLDS: dict[str, Callable[[Any], bool]] = {
    "README.md": lambda page: page.out.logits.shape[1] == 1 and 0.25 <= _kept(page.out) < 1,
    "docs/index.md": lambda page: (
        0.25 <= _kept(page.first) < 0.3 and page.answer.split() == page.question.answer.split()
    ),
    "docs/troubleshooting.md": _of_troubleshooting,
    "docs/extending.md": _of_extending,
}


def _prepare(page: types.ModuleType, name: str) -> None:
    """Bind what a page speaks of beside a model."""
    if name == "docs/extending.md":
        from families.family import Family, images
        from support import tiny_llava

        from zipvl_compile.passes.graph import op_traits
        from zipvl_compile.passes.policy import Policy

        vars(page).update(
            drop_dead_masks=page, Row=pipeline.Row, Policy=Policy, _row=op_traits._row, T=op_traits.T, V=op_traits.V,
            Family=Family, images=images, FAMILIES={}, _my_vlm=tiny_llava.model,
        )  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_the_python_blocks_of_a_page_run_in_their_order(name, reader):
    _prepare(reader, name)
    for block in pages.blocks(name, "python"):
        if not block.not_run:
            _run(reader, block)
            vars(reader).setdefault("first", vars(reader).get("out"))
    assert HOLDS.get(name, lambda page: True)(reader)


def test_few_blocks_are_not_run_and_each_says_why():
    marked = [block for page in PAGES for block in pages.blocks(page) if block.not_run]
    assert {page: sum(one.page == page for one in marked) for page in {one.page for one in marked}} == NOT_RUN
    comments = sum(len(re.findall("<!-- not run", (ROOT / page).read_text())) for page in PAGES)
    assert comments == len(marked), "a comment of this kind stands before no block"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page):
    assert {block.language for block in pages.blocks(page)} <= LANGUAGES


# ---- Commands


def _commands(block: Block) -> list[tuple[dict[str, str], list[str]]]:
    """Return the commands of a block: what they set in the environment, and their words."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
        if words:
            found.append((dict(word.split("=", 1) for word in words[:count]), words[count:]))
    return found


def _check_zipvl(words: list[str]) -> None:
    name, *arguments = words
    typer.main.get_command(app).commands[name].make_context(name, arguments)


def _check_make(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True, text=True)


def _check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_spec(words[1].partition(".")[0])
    else:
        assert words[0] == USERS_SCRIPT or (ROOT / words[0]).exists()


def _check_pip(words: list[str]) -> None:
    extras = re.findall(
        r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M
    )
    assert words[0] == "install"
    assert {extra for word in words for extra in re.findall(r"\[(.+)\]", word)} <= {*extras}


def _check_pytest(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if word.startswith("tests"))


def _check_lmms_eval(words: list[str]) -> None:
    """Its own options are tried by `make test-lmms`; here, those of zipvl."""
    told = dict(itertools.pairwise(words))
    names = {one.partition("=")[0] for one in told["--model_args"].split(",")} - {"pretrained", "base", "backend"}
    assert told["--model"] == "zipvl" and names <= set(ZipVLOptions.__dataclass_fields__)


CHECKS = {
    "lmms-eval": _check_lmms_eval,
    "zipvl": _check_zipvl, "make": _check_make, "python": _check_python, "pip": _check_pip, "pytest": _check_pytest,
}  # fmt: skip


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: f"{block.page}:{block.line}")
def test_the_commands_of_a_block_exist_with_their_options(block):
    for _, (command, *words) in _commands(block):
        assert command in CHECKS, f"{command}: say how to check it in CHECKS, or mark the block as not run"
        CHECKS[command](words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist_with_their_options(page):
    commands = typer.main.get_command(app).commands
    for command, *words in map(str.split, pages.code_in_text(page)):
        if command == "zipvl" and words and not words[0].startswith("-"):
            options = {option for one in commands[words[0]].params for option in one.opts}
            assert {word for word in words if word.startswith("--")} <= options, words
        if command == "make" and words:
            _check_make(words)


# ---- What the environment asks for

SCRIPT = """
import sys, torch
sys.path.insert(0, {benchmarks!r})
from graph_example import Decoder, DynamicCache, LlamaConfig, HEADS, KV_HEADS, WIDTH
from zipvl_compile import kept_tokens

config = LlamaConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
run = torch.compile(Decoder(), backend="zipvl", options={{"inner": "eager", "min_tokens": 0, "keep_ratio": 0.5}})
for tokens in (64, 96):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        run(torch.ones(1, tokens, WIDTH), cache)
    print("kept", kept_tokens(cache)[0].shape[2])
"""


def _run_script(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = folder / USERS_SCRIPT
    script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks")))
    return subprocess.run(
        [sys.executable, USERS_SCRIPT],
        cwd=folder,
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )


def test_what_the_environment_asks_for_is_written(tmp_path):
    """All of it in one process: what each variable is said to do in the pages."""
    told = [told for block in COMMANDS for told, words in _commands(block) if words[1:] == [USERS_SCRIPT]]
    # What ZIPVL_LOG prints, it prints for `generate`: tests/zipvl_compile/report/test_requests.py.
    names = {name for one in told for name in one}
    assert names == {"TORCH_LOGS", "ZIPVL_DUMP", "TORCH_COMPILE_DISABLE", "ZIPVL_LOG"}
    logs = ",".join(one["TORCH_LOGS"] for one in told if "TORCH_LOGS" in one)
    (folder,) = (one["ZIPVL_DUMP"] for one in told if "ZIPVL_DUMP" in one)
    done = _run_script(tmp_path, TORCH_LOGS=logs, ZIPVL_DUMP=folder)
    assert done.stdout.split() == ["kept", "32", "kept", "48"]
    for said in ("layers.0 prefill: rewritten", "seconds by pass", "prompt of 64 tokens: 2 layers keep", "Recompiling"):
        assert said in done.stderr
    assert (tmp_path / folder / "graph_000" / "00_fold_experts_before.py").exists()


def test_a_process_without_compiling_is_dense(tmp_path):
    (disabled,) = (told for block in COMMANDS for told, _ in _commands(block) if "TORCH_COMPILE_DISABLE" in told)
    assert _run_script(tmp_path, **disabled).stdout.split() == ["kept", "64", "kept", "96"]
