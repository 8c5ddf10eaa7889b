"""The optimizer of the stages: which weights take which rule, and how the rate runs."""

import pytest
import torch

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.build import build_model
from zipvl_compile.demo.tiny_lvlm.canvas import LARGE
from zipvl_compile.demo.tiny_lvlm.optimizer import Optimizer


def parts(model):
    return [(model.model, 1e-3), (model.lm_head, 5e-4)]


def test_without_muon_all_is_adamw_and_only_matrices_decay():
    model = build_model(0, LARGE)
    optimizer = Optimizer(parts(model), 0.05, muon=0.0)
    assert [type(one).__name__ for one in optimizer.optimizers] == ["AdamW"]
    assert sorted(map(id, optimizer.parameters)) == sorted(map(id, model.parameters()))
    for group in optimizer.groups:
        assert group["weight_decay"] == (0.05 if group["params"] and group["params"][0].dim() > 1 else 0.0)


def test_muon_takes_the_matrices_inside_layers_at_their_own_rate_and_nothing_else():
    model = build_model(0, LARGE)
    optimizer = Optimizer(parts(model), 0.05, muon=3.0)
    assert sorted(map(id, optimizer.parameters)) == sorted(map(id, model.parameters()))
    (group,) = optimizer.optimizers[1].param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(parameter)] for parameter in group["params"]}
    assert group["lr"] == pytest.approx(3e-3) and all(parameter.dim() == 2 for parameter in group["params"])
    inside = ("proj.weight", "fc1.weight", "fc2.weight", "linear_1.weight", "linear_2.weight")
    assert taken == {name for name in names.values() if name.endswith(inside)}


@pytest.mark.parametrize("muon", [0.0, 3.0])
def test_an_update_lowers_the_loss_and_cuts_the_gradient(muon):
    torch.manual_seed(0)
    part = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    x, losses = torch.randn(16, 8), []
    optimizer = Optimizer([(part, 1e-2)], 0.0, muon)
    for _ in range(20):
        losses.append(1e3 * (part(x) - x).square().mean())
        optimizer.update(losses[-1])
        norm = sum(parameter.grad.square().sum() for parameter in part.parameters()).sqrt()
        assert norm == pytest.approx(1.0, rel=1e-3)
    assert losses[-1] < 0.7 * losses[0]


def test_the_rate_warms_up_and_falls_to_a_fiftieth():
    optimizer = Optimizer([(torch.nn.Linear(2, 2), 0.5)], 0.0, muon=0.0)
    rates = []
    for step in range(1000):
        optimizer.set_rate(step, 1000, warmup=100)
        rates.append(optimizer.groups[0]["lr"])
    assert rates[0] < 0.01 and max(rates) == max(rates[80:120]) <= 0.5
    assert rates[-1] == pytest.approx(0.01, rel=1e-3)
