"""What is traced is told the options of the call that it is traced for."""

import functools

import pytest
import torch

from zipvl_compile import backend, traced_options
from zipvl_compile.options import ZipVLOptions


class Told(torch.nn.Module):
    def forward(self, x):
        told = traced_options.evicts_to() == "host"
        return x + traced_options.reselect_every() + 1000 * told + 10_000 * traced_options.evict_bits()


GIVEN = {"reselect_every": 7, "evict": "host", "evict_bits": 8, "inner": "eager"}


@pytest.mark.parametrize(
    "how",
    [
        lambda f, options: torch.compile(f, backend="zipvl", options=options),
        lambda f, options: torch.compile(f, backend=functools.partial(backend.zipvl, options=options)),
    ],
    ids=["options", "partial"],
)
def test_the_options_of_the_call(how):
    torch._dynamo.reset()
    x = torch.zeros(2)
    assert how(Told(), GIVEN)(x).tolist() == [81_007.0] * 2
    torch._dynamo.reset()
    assert how(Told(), {"inner": "eager"})(x).tolist() == [40_000.0] * 2


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"evict": "keep"}])
def test_nothing_is_reselected_where_nothing_is_dropped(options):
    torch._dynamo.reset()
    f = torch.compile(Told(), backend="zipvl", options=GIVEN | options)
    assert f(torch.zeros(1)).item() % 1000 == 0


def test_outside_of_a_compile_they_are_the_defaults():
    usual = ZipVLOptions.parse()
    assert traced_options.evicts_to() == usual.evict == "drop"
    assert traced_options.reselect_tokens() == usual.reselect_tokens == 128
