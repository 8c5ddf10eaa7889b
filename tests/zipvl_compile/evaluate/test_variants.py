"""The table of variants: dense first, names that the figure can take apart, options that the backend takes."""

import pytest

from zipvl_compile.evaluate import variants
from zipvl_compile.evaluate.variants import DENSE, PICTURE_SCALE, QUICK, VARIANTS, chosen, family, value


def test_dense_always_comes_first_and_once():
    assert list(chosen(["tau 0.9", DENSE, "tau 0.9"])) == [DENSE, "tau 0.9"]
    assert list(chosen()) == list(VARIANTS) and VARIANTS[DENSE] == {}
    assert set(QUICK) <= set(VARIANTS)


def test_a_name_is_a_family_and_a_value():
    assert (family("queries=all tau 0.9"), value("queries=all tau 0.9")) == ("queries=all tau", "0.9")
    assert (family(DENSE), value(DENSE)) == (DENSE, "")
    for name, options in VARIANTS.items():
        assert "," not in name, "the command line takes names with commas between"
        assert name == DENSE or value(name) in {str(setting) for setting in options.values()}


def test_the_papers_rule_is_measured_with_selected_and_with_all_queries():
    settings = [(options["tau"], options.get("queries")) for options in VARIANTS.values() if "tau" in options]
    assert {(tau, queries) for tau in (0.99, 0.975, 0.9, 0.8) for queries in (None, "all")} <= set(settings)


def test_unknown_names_and_options_are_said(monkeypatch):
    with pytest.raises(ValueError, match=r"--variants: expected names among dense, .*got 'taau 1'"):
        chosen(["taau 1"])
    monkeypatch.setitem(variants.VARIANTS, "new 1", {"tauu": 1})
    with pytest.raises(ValueError, match="Did you mean 'tau'"):
        chosen(["new 1"])
    assert list(chosen(["picture x 0.63"])) == [DENSE, "picture x 0.63"] and PICTURE_SCALE in VARIANTS["picture x 0.63"]
