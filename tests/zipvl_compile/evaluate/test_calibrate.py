"""Calibration: costs of layers alone, the choice by hand, and the file that the options read."""

import json

import pytest
import torch
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import model, prompt

import zipvl_compile
from zipvl_compile.evaluate import calibrate as module
from zipvl_compile.evaluate.calibrate import Calibration, Measured, calibrate
from zipvl_compile.options import OptionError, ZipVLOptions

OPTIONS = {"tau": 0.6}


def prompts(count=2, n=60):
    return [{"input_ids": prompt(n, seed=seed)} for seed in range(count)]


@pytest.fixture(scope="module")
def measured():
    return Measured(model(num_hidden_layers=3), prompts(), OPTIONS)


def test_layers_alone_and_together(measured):
    assert measured.layers == [0, 1, 2]
    none, whole = measured.cost([])
    assert none == pytest.approx(0.0, abs=1e-6) and whole == 1.0
    alone = [measured.cost([layer]) for layer in measured.layers]
    assert all(cost > 1e-4 and kept < 1 for cost, kept in alone)
    together, kept = measured.cost(measured.layers)
    assert kept < min(share for _, share in alone) and together > none


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


ALONE = {0: 0.5, 1: 0.01, 2: 0.1, 3: 0.02}


class _Fixed:
    """Costs that add up to more than their sum by a tenth, for four layers."""

    def __init__(self, *_):
        self.layers, self.prompts, self.alone = [0, 1, 2, 3], [1, 2], ALONE

    def cost(self, layers):
        return sum(self.alone[layer] for layer in layers) * (1.1 if len(layers) > 1 else 1.0), 0.5


@pytest.mark.parametrize(
    ("target", "dense", "cost"),
    [(1.0, [], 0.693), (0.65, [0], 0.143), (0.135, [0, 2], 0.033), (0.0305, [0, 2, 3], 0.01), (0.0, [0, 1, 2, 3], 0.0)],
)
def test_the_choice_by_hand(monkeypatch, target, dense, cost):
    monkeypatch.setattr(module, "Measured", _Fixed)
    said = []
    found = calibrate(None, [], OPTIONS, target, said.append)
    assert found.options == {"tau": 0.6, "dense_layers": dense}
    assert found.cost == pytest.approx(cost) and found.costs == ALONE
    assert said[1:5] == [f"layer {layer}" for layer in range(4)]


def test_the_options_read_the_file(tmp_path):
    path = tmp_path / "c.json"
    Calibration({"policy": "window", "tau": 0.9, "dense_layers": [0, 3]}, {}, 0.0, 0.5, 0.02, 2).write(path)
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
    Calibration({"dense_layers": [1]}, {0: 0.1, 1: 0.2}, 0.1, 0.7, 0.2, 3).write(tmp_path / "a" / "c.json")
    found = json.loads((tmp_path / "a" / "c.json").read_text())
    assert found["costs"] == {"0": 0.1, "1": 0.2} and found["options"] == {"dense_layers": [1]}
