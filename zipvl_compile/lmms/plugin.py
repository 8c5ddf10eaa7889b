"""What lmms-eval reads through the entry point `lmms_eval.models`: the model `zipvl`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return where the model is, without importing it."""
    where = "zipvl_compile.lmms.model"
    return ModelManifest("zipvl", simple_class_path=f"{where}.ZipVLSimple", chat_class_path=f"{where}.ZipVL")
