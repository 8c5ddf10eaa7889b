"""lmms-eval's model is chosen by the configuration of a checkpoint."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.lmms.bases import ANY, BASES, base_of


def test_a_checkpoint_names_its_base():
    assert base_of(str(CHECKPOINT)) == "llava_hf"


def test_types_that_lmms_eval_has_no_model_for_take_the_general_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "a_new_one"}))
    assert base_of(str(tmp_path)) == ANY


def test_types_are_those_of_transformers():
    assert set(BASES) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize(("pretrained", "got"), [(None, "got none"), ("empty", r"got '.*empty'")])
def test_without_a_configuration_there_is_an_error(pretrained, got, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"'pretrained': expected .*{got}"):
        base_of(pretrained and str(tmp_path / pretrained))
