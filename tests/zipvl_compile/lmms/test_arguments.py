"""Arguments of `--model_args` go to zipvl or to lmms-eval's model, and to no one else."""

from __future__ import annotations

import pytest

from zipvl_compile.lmms.arguments import check_known, parameters, split, with_device_map


class Outer:
    def __init__(self, pretrained="a", device="cuda", device_map="auto", **kwargs):
        pass


class Inner(Outer):
    def __init__(self, *args, device_map="", fps=None, **kwargs):
        pass


def test_options_and_arguments_are_told_apart():
    got = split({"pretrained": "m", "tau": 0.9, "min_tokens": 0, "base": "gemma3", "batch_size": "1"})
    assert (got.base, got.backend) == ("gemma3", "zipvl")
    assert got.options == {"tau": 0.9, "min_tokens": 0} and got.others == {"pretrained": "m", "batch_size": "1"}


@pytest.mark.parametrize(
    ("text", "value"), [("[1, 2]", [1, 2]), ("'[1,2]'", [1, 2]), ("None", None), ("null", None), (0.5, 0.5)]
)
def test_texts_are_lists_and_nothing(text, value):
    assert split({"skip_in": text, "skip": "layer"}).options["skip_in"] == value if value is not None else True
    assert split({"dense_layers": text} if value else {"keep_ratio": text}).options != {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": 2}, r"'tau': expected a fraction in \(0, 1\], got 2"),
        ({"tau": 0.9, "keep_ratio": 0.5}, "expected one of them"),
        ({"dense_layers": "[1"}, r"'dense_layers'.*got '\[1'"),
        ({"backend": "zipvel"}, "'backend': expected one of none, .*got 'zipvel'"),
        ({"backend": "none", "tau": 0.9}, "tau: expected backend=zipvl.*got backend=none"),
    ],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        split(given)


def test_arguments_of_all_base_classes_are_known():
    assert parameters(Inner) == {"pretrained": "a", "device": "cuda", "device_map": "", "fps": None}


def test_unknown_arguments_are_an_error_with_close_names():
    check_known(["pretrained", "fps"], "inner", parameters(Inner))
    with pytest.raises(ValueError, match=r"lmms-eval's inner \(pretrained, .*got 'keep_ration'.*'keep_ratio'"):
        check_known(["keep_ration"], "inner", parameters(Inner))
    with pytest.raises(ValueError, match=r"got 'pretraind'. Did you mean 'pretrained'"):
        check_known(["pretraind"], "inner", parameters(Inner))
    with pytest.raises(ValueError, match=r"Remove it\."):
        check_known(["zzzz"], "inner", parameters(Inner))


@pytest.mark.parametrize(
    ("given", "base", "processes", "chosen"),
    [
        ({}, Inner, 1, "cuda"),
        ({"device": "cpu"}, Inner, 1, "cpu"),
        ({"device": "cpu"}, Outer, 1, "cpu"),
        ({"device": "cuda:1"}, Outer, 1, None),
        ({"device": "cpu", "device_map": "balanced"}, Outer, 1, "balanced"),
        ({"device": "cpu"}, Inner, 2, None),
        ({"device": "cpu"}, object, 1, None),
    ],
)
def test_models_are_told_where_they_go(given, base, processes, chosen):
    got = with_device_map(given, parameters(base), processes)
    assert got == (given if chosen is None else {**given, "device_map": chosen})
