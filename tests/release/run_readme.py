"""Run by `make test-dist` where only the wheel and its command line are installed: every Python block of README.md.

python run_readme.py README.md        Inductor, default options, the small bundled model in the place of the hub's
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import zipvl_compile
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.evaluate import questions_for_demo


def main(readme: Path) -> None:
    assert "site-packages" in zipvl_compile.__file__, zipvl_compile.__file__
    load, processor = AutoModelForImageTextToText.from_pretrained, AutoProcessor.from_pretrained(CHECKPOINT)
    AutoModelForImageTextToText.from_pretrained = lambda name: load(CHECKPOINT)
    question = next(questions_for_demo(1, seed=0))
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    page = {
        "torch": torch, "zipvl_compile": zipvl_compile, "AutoModelForImageTextToText": AutoModelForImageTextToText,
        "processor": processor, "image": question.image, "prompt": question.prompt, "inputs": inputs,
    }  # fmt: skip
    text = readme.read_text()
    for found in re.finditer(r"(?ms)^```python\n(.*?)^```", text):
        page["model"] = load(CHECKPOINT)
        page["model"].compile(backend="zipvl")  # as the first block does it
        line = text.count("\n", 0, found.start(1)) + 1
        exec(compile("\n" * (line - 1) + found[1], str(readme), "exec"), page)
        print("ran", line)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
