"""Which traced calls are for inference; tests/scenarios/test_gradients.py compares the gradients of the others."""

from __future__ import annotations

import pytest
import torch
from support.graph_modules import Small

from zipvl_compile import gradients

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Told(Small):
    """Adds one where it is told so."""

    def forward(self, x):
        return super().forward(x) + (1 if gradients.tracing_for_zipvl() else 0)


@pytest.mark.parametrize(
    ("backend", "on", "training", "told"),
    [
        ("zipvl", False, False, True),
        ("zipvl", True, False, True),
        ("zipvl", False, True, True),
        ("zipvl", True, True, False),
        ("eager", False, False, False),
    ],
)
def test_a_traced_frame_is_told_whether_it_is_for_zipvl_and_for_inference(backend, on, training, told):
    model = Told().train(training)
    x, options = torch.ones(1, 3), {"options": {"inner": "eager"}} if backend == "zipvl" else {}
    with torch.set_grad_enabled(on):
        compiled = torch.compile(model, backend=backend, **options)(x)
        assert torch.equal(compiled, model(x) + (1 if told else 0))


def test_nothing_is_traced_outside_a_compile():
    assert not gradients.tracing_for_zipvl()
    assert gradients.gradients_matter()
    with torch.no_grad():
        assert not gradients.gradients_matter()
