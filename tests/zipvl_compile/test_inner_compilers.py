"""The compilers that take the rewritten graphs."""

import warnings

import pytest
import torch
from support.dynamo_graph import dynamo_graph
from torch._inductor import compile_fx as inductor
from torch._inductor.exc import CppCompileError, InductorError

from zipvl_compile import inner_compilers


def test_modes_are_those_of_inductor():
    assert {"default", "reduce-overhead", "max-autotune"} <= set(inner_compilers.inductor_modes())
    assert "triton.cudagraphs" in inner_compilers.inductor_modes()["reduce-overhead"]


def test_aot_eager_runs_the_graph():
    gm, x = dynamo_graph(lambda x: x * 3, torch.ones(2)), torch.tensor([1.0, 2.0])
    (out,) = inner_compilers.compile_with_aot_eager(gm, [x])(x)
    assert torch.equal(out, 3 * x)


class Failing:
    """Inductor whose C++ code does not compile as long as it has checks of indices."""

    def __init__(self, error, always=False):
        self.error, self.always, self.asked = error, always, []

    def __call__(self, gm, example_inputs, config_patches=None):
        self.asked.append(config_patches)
        if self.always or "assert_indirect_indexing" not in (config_patches or {}):
            raise self.error
        return gm.forward


CPP = InductorError(CppCompileError(["g++"], "error: 'tmp2' was not declared in this scope"), None)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_graph_whose_checks_do_not_compile_has_none(mode, monkeypatch):
    compiler = Failing(CPP)
    monkeypatch.setattr(inductor, "compile_fx", compiler)
    monkeypatch.setattr(inner_compilers, "CHECKS_MAY_FAIL", True)
    gm, x = dynamo_graph(lambda x: x * 3, torch.ones(2)), torch.ones(2)
    with pytest.warns(UserWarning, match="outside of the vocabulary"):
        compiled = inner_compilers.compile_with_inductor(gm, [x], mode)
    assert torch.equal(compiled(x)[0], 3 * x)
    first, second = compiler.asked
    assert second == (first or {}) | {"assert_indirect_indexing": False}
    assert first == (mode and inner_compilers.inductor_modes()[mode])


@pytest.mark.parametrize(
    ("error", "may_fail", "always", "calls"),
    [
        (CPP, False, False, 1),
        (CPP, True, True, 2),
        (InductorError(ValueError("another"), None), True, False, 1),
        (ValueError("another"), True, False, 1),
    ],
    ids=["a release without the fault", "also without checks", "another fault", "another error"],
)
def test_other_errors_stay_errors(error, may_fail, always, calls, monkeypatch):
    compiler = Failing(error, always)
    monkeypatch.setattr(inductor, "compile_fx", compiler)
    monkeypatch.setattr(inner_compilers, "CHECKS_MAY_FAIL", may_fail)
    with warnings.catch_warnings(), pytest.raises(type(error)) as raised:
        warnings.simplefilter("error")
        inner_compilers.compile_with_inductor(dynamo_graph(lambda x: x * 3, torch.ones(2)), [torch.ones(2)], None)
    assert raised.value is error and len(compiler.asked) == calls
