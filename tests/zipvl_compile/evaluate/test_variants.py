"""The table of variants: dense first, names that the figure can take apart, options that the backend takes."""

import dataclasses

import pytest

from zipvl_compile import policies
from zipvl_compile.evaluate import variants
from zipvl_compile.evaluate.variants import (
    DENSE,
    OF_PRESETS,
    PICTURE_SCALE,
    QUICK,
    VARIANTS,
    chosen,
    family,
    value,
)
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.policies.presets import PRESETS


def test_dense_always_comes_first_and_once():
    assert list(chosen(["paper 0.9", DENSE, "paper 0.9"])) == [DENSE, "paper 0.9"]
    assert list(chosen()) == list(VARIANTS) and VARIANTS[DENSE] == {}
    assert set(QUICK) <= set(VARIANTS)


def test_a_name_is_a_family_and_a_value():
    assert (family("kept and window 0.9"), value("kept and window 0.9")) == ("kept and window", "0.9")
    assert (family(DENSE), value(DENSE)) == (DENSE, "")
    for name, options in VARIANTS.items():
        assert "," not in name, "the command line takes names with commas between"
        assert name == DENSE or value(name) in {str(setting) for setting in options.values()}


def test_every_policy_and_preset_is_measured():
    assert {options.get("policy") for options in VARIANTS.values()} >= set(policies.names())
    for preset, name in OF_PRESETS.items():
        as_asked, as_named = (
            dataclasses.replace(ZipVLOptions.parse(options), preset=None, policy=None)
            for options in ({"preset": preset}, VARIANTS[name])
        )
        assert as_asked == as_named
    assert set(OF_PRESETS) == set(PRESETS)


def test_unknown_names_and_options_are_said(monkeypatch):
    with pytest.raises(ValueError, match=r"--variants: expected names among dense, .*got 'taau 1'"):
        chosen(["taau 1"])
    monkeypatch.setitem(variants.VARIANTS, "new 1", {"tauu": 1})
    with pytest.raises(ValueError, match="Did you mean 'tau'"):
        chosen(["new 1"])
    assert list(chosen(["picture x 0.63"])) == [DENSE, "picture x 0.63"] and PICTURE_SCALE in VARIANTS["picture x 0.63"]
