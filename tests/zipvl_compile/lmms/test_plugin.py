"""lmms-eval finds the model; `make test-lmms` has it installed."""

from __future__ import annotations

import pytest

registry = pytest.importorskip("lmms_eval.models")

from zipvl_compile.lmms import model, plugin  # noqa: E402


def test_the_manifest_names_the_classes():
    manifest = plugin.manifest()
    assert manifest.model_id == "zipvl"
    assert registry.get_model("zipvl") is model.ZipVL and registry.get_model("zipvl", True) is model.ZipVLSimple
    assert registry.get_model_manifest("zipvl") == manifest  # by the entry point
