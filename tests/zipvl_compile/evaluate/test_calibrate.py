"""Calibration: costs of layers alone, the choice by hand, and the file that the options read."""

import json

import pytest
import torch
from support.layer_choices import ALONE, choices
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import model, prompt

import zipvl_compile
from zipvl_compile.evaluate import calibrate as module
from zipvl_compile.evaluate.calibrate import Calibration, Measured, calibrate
from zipvl_compile.evaluate.layer_choices import Choice, Found
from zipvl_compile.options import OptionError, ZipVLOptions

OPTIONS = {"tau": 0.6}


def prompts(count=2, n=60):
    return [{"input_ids": prompt(n, seed=seed)} for seed in range(count)]


@pytest.fixture(scope="module")
def measured():
    found = Measured(model(num_hidden_layers=3), prompts())
    assert not found.compile(OPTIONS)
    return found


def test_layers_alone_and_together(measured):
    assert measured.layers == [0, 1, 2] and measured.left_alone == []
    dense = measured.of(())
    assert dense.cost == pytest.approx(0.0, abs=1e-6) and dense.kept == 1.0
    alone = [measured.of([layer]) for layer in measured.layers]
    assert all(one.cost > 1e-4 and one.kept < 1 for one in alone)
    together = measured.of(measured.layers)
    assert together.kept < min(one.kept for one in alone) and together.cost > dense.cost


def test_a_cost_is_that_of_a_model_compiled_for_it(measured):
    torch._dynamo.reset()
    alone = model(num_hidden_layers=3)
    alone.compile(backend="zipvl", options=OPTIONS | {"dense_layers": [0, 2], "inner": "eager", "min_tokens": 0})
    x = measured.prompts[0]
    out = alone.generate(**x, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with zipvl_compile.per_request.only_in([1]):
        got = measured.compiled.generate(
            **x, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(out.logits[0], got.logits[0], rtol=1e-4, atol=1e-4)


class _Fixed:
    """Costs that add up to more than their sum by a tenth, for four layers."""

    def __init__(self, *_):
        self.layers, self.left_alone, self.prompts, self.skips = [0, 1, 2, 3], [7], [1, 2], ()

    def compile(self, options):
        self.skips = tuple(options.get("skip_in", ()))
        return bool(self.skips)

    def of(self, layers):
        each = [ALONE[layer][layer in self.skips] for layer in layers]
        cost, flops, tokens = (sum(column) for column in zip(*each, strict=True)) if each else (0.0, 0.0, 0.0)
        return Found(cost * (1.1 if len(each) > 1 else 1.0), 1 - tokens, round(1e6 * (1 - flops)))


@pytest.mark.parametrize(
    ("target", "dense", "passing", "cost"),
    [
        (2.0, [7], [0, 1, 2, 3], 1.606),
        (0.7, [0, 7], [1, 2, 3], 0.616),  # .66 is within it, 1.1 * .66 is not
        (0.0655, [0, 2, 7], [1], 0.044),
        (0.0, [0, 1, 2, 3, 7], [], 0.0),
    ],
)
def test_the_choice_is_measured_together(monkeypatch, target, dense, passing, cost):
    monkeypatch.setattr(module, "Measured", _Fixed)
    said = []
    found = calibrate(None, [], OPTIONS, target, said.append)
    skip = {"skip": "layer", "skip_in": passing} if passing else {}
    assert found.options == {"tau": 0.6, "dense_layers": dense} | skip
    assert found.cost == pytest.approx(cost) and found.cost <= target
    assert [(one.layer, one.skip, one.cost) for one in found.choices] == [
        (one.layer, one.skip, one.cost) for one in choices()
    ]
    assert said[1:5] == [f"layer {layer}, attention alone" for layer in range(4)]


def test_layers_are_measured_as_if_each_selected_for_itself(monkeypatch):
    monkeypatch.setattr(module, "Measured", _Fixed)
    assert calibrate(None, [], {"score_every": 4, "skip": "attention"}, 2.0).options["score_every"] == 1


@pytest.mark.parametrize("given", [{"skip": "attention"}, {"policy": "skip_layers"}, {"prefill": "dense"}])
def test_what_is_skipped_is_measured_only_where_the_options_leave_it_open(monkeypatch, given):
    monkeypatch.setattr(module, "Measured", _Fixed)
    found = calibrate(None, [], given, 2.0)
    assert {one.skip for one in found.choices} == {"layer" if "policy" in given else "attention"}
    assert found.options == {**given, "dense_layers": [7]}


def test_a_real_model_chooses_what_to_skip():
    torch._dynamo.reset()
    found = calibrate(model(num_hidden_layers=3), prompts(), OPTIONS, 1e9)
    whole = {one.layer: one for one in found.choices if one.skip == "layer"}
    part = {one.layer: one for one in found.choices if one.skip == "attention"}
    assert list(whole) == list(part) == [0, 1, 2]
    assert all(whole[n].flops > part[n].flops and whole[n].tokens == part[n].tokens > 0 for n in (0, 1))
    assert found.options["skip_in"] and found.options["dense_layers"] == []
    assert found.flops == pytest.approx(1 - sum(one.flops for one in found.choices if one.chosen), abs=0.15)


def test_the_options_read_the_file(tmp_path):
    path = tmp_path / "c.json"
    Calibration({"policy": "window", "tau": 0.9, "dense_layers": [0, 3]}, (), 0.0, 0.5, 0.9, 0.02, 2).write(path)
    parsed = ZipVLOptions.parse({"calibration": str(path)})
    assert (parsed.unselected, parsed.tau, parsed.dense_layers) == ("window", 0.9, (0, 3))
    changed = ZipVLOptions.parse({"calibration": path, "keep_ratio": 0.3, "window": 9})
    assert (changed.keep_ratio, changed.window, changed.dense_layers) == (0.3, 9, (0, 3))
    assert ZipVLOptions.parse({"calibration": path, "policy": "hold"}).unselected == "hold"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": {"tua": 1}}', '{"options": {"tau": 7}}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"'calibration': expected a file that `zipvl calibrate` wrote, got"):
        ZipVLOptions.parse({"calibration": str(path)})
    with pytest.raises(OptionError, match="No such file"):
        ZipVLOptions.parse({"calibration": str(tmp_path / "none.json")})


def test_what_is_written_is_plain(tmp_path):
    choices = Choice(0, "attention", 0.1, 0.02, 0.1), Choice(0, "layer", 0.2, 0.04, 0.1, True)
    options = {"dense_layers": [1], "skip": "layer", "skip_in": [0]}
    Calibration(options, choices, 0.1, 0.7, 0.96, 0.2, 3).write(tmp_path / "a" / "c.json")
    found = json.loads((tmp_path / "a" / "c.json").read_text())
    assert found["choices"][1]["skip"] == "layer" and found["options"] == options
    assert ZipVLOptions.parse({"calibration": tmp_path / "a" / "c.json"}).skip_in == (0,)
