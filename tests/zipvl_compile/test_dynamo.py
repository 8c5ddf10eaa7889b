"""The private names of PyTorch behind their functions: each does what its docstring says, in the PyTorch installed."""

from __future__ import annotations

import functools

import pytest
import torch
from support.dynamo_graph import dynamo_graph
from support.graph_modules import Small
from torch import nn

from zipvl_compile import backend, dynamo

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def callback(**given):
    return torch.compile(Small(), **given).dynamo_ctx.callback


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (backend.zipvl, True),
        (functools.partial(functools.partial(backend.zipvl, mode=None), options={"tau": 0.5}), True),
        (callback(backend="zipvl"), True),
        (callback(backend="zipvl", options={"tau": 0.5}), True),
        (callback(backend=functools.partial(backend.zipvl, options={"tau": 0.5})), True),
        (callback(backend="eager"), False),
        (callback(backend="inductor"), False),
        (lambda gm, inputs: gm, False),
        (None, False),
    ],
    ids=["function", "partial", "name", "options", "compiled-partial", "eager", "inductor", "other", "none"],
)
def test_which_backend_is_ours(given, ours):
    assert dynamo.is_zipvl(given) is ours


class Asking(nn.Module):
    """Asks outside of every graph, while its compiled forward runs."""

    def forward(self, x):
        self.answers = ask()
        return x + 1


@torch.compiler.disable
def ask():
    limit = torch._dynamo.config.recompile_limit
    return dynamo.backend_of_call(), dynamo.runs_uncompiled_for_zipvl(), limit


@pytest.mark.parametrize("name", ["zipvl", "eager"])
def test_the_backend_of_the_running_call_is_found(name):
    assert dynamo.backend_of_call() is None and not dynamo.runs_uncompiled_for_zipvl()
    model = Asking()
    compiled = torch.compile(model, backend=name, **({"options": {"inner": "eager"}} if name == "zipvl" else {}))
    compiled(torch.ones(2))
    found, ours, _ = model.answers
    assert found is dynamo.innermost_backend(compiled.dynamo_ctx.callback)
    assert ours is dynamo.is_zipvl(found) is (name == "zipvl")


@pytest.mark.parametrize(
    ("name", "set_by_user", "seen"), [("zipvl", 8, 256), ("zipvl", 4, 4), ("zipvl", 70, 70), ("eager", 8, 8)]
)
def test_the_recompile_limit_is_raised_in_zipvls_calls_only(name, set_by_user, seen):
    model, config = Asking(), torch._dynamo.config
    with config.patch(recompile_limit=set_by_user):
        f = torch.compile(model, backend=name, **({"options": {"inner": "eager"}} if name == "zipvl" else {}))
        f(torch.ones(2))
        assert model.answers[2] == seen and config.recompile_limit == set_by_user
        f(torch.ones(2))
        assert model.answers[2] == set_by_user, "nothing is compiled, nothing is raised"


def test_compiled_code_is_kept_apart_where_pytorch_can():
    assert torch.compile(Small(), backend="eager", **dynamo.apart()) is not None


def test_compiled_models_are_seen_through():
    model, other = Small(), Small()
    wrapped = torch.compile(model, backend="eager")
    assert dynamo.original_of(wrapped) is model and dynamo.original_of(model) is model
    assert not dynamo.is_wrapped_for_zipvl(model), "wrapped, but for another backend"
    ours = torch.compile(model, backend="zipvl")
    assert dynamo.is_wrapped_for_zipvl(model) and not dynamo.is_wrapped_for_zipvl(other)
    model.compile(backend="eager")
    assert dynamo.original_of(ours) is model


def test_a_users_error_keeps_its_type_and_its_words():
    def fails(gm, inputs):
        raise dynamo.UserError("x: expected 1, got 2. Use 1.")

    with pytest.raises(dynamo.UserError, match=r"^x: expected 1, got 2\. Use 1\."):
        torch.compile(Small(), backend=fails)(torch.ones(1, 3))
    assert issubclass(dynamo.UserError, ValueError)


def test_gradient_switches_are_found():
    def f(x):
        with torch.no_grad():
            y = x * 2
        return y + x

    assert [node.args for node in dynamo.gradient_switches(dynamo_graph(f, torch.ones(2)).graph)] == [(False,), (True,)]


def test_sizes_that_depend_on_data_are_allowed_in_one_graph_only():
    gm, other = (dynamo_graph(lambda x: x + 1, torch.ones(2, k), dynamic=True) for k in (3, 4))
    envs = [next(n for n in g.graph.nodes).meta["example_value"] for g in (gm, other)]
    envs = [value.node.shape_env if isinstance(value, torch.SymInt) else value.fake_mode.shape_env for value in envs]
    dynamo.allow_data_dependent_sizes(gm.graph)
    assert [env.settings.allow_dynamic_output_shape_ops for env in envs] == [True, False]
    dynamo.allow_data_dependent_sizes(torch.fx.Graph())  # no tensor, no ShapeEnv


@pytest.mark.parametrize(("mark", "compiles"), [(True, 1), (False, 2)])
def test_a_size_that_changes_is_compiled_for_once(mark, compiles):
    count = 0

    def counting(gm, inputs):
        nonlocal count
        count += 1
        return gm.forward

    f = torch.compile(lambda x: x * 2, backend=counting)
    for size in (3, 4, 5):
        x = torch.ones(2, size)
        if mark:
            dynamo.mark_size_as_changing(x, 1)
        f(x)
    assert count == compiles


def test_tensors_are_real_amid_fake_ones():
    seen = []

    def look(gm, inputs):
        with dynamo.with_real_tensors():
            seen.append(torch.ones(2) + 1)
        return gm.forward

    torch.compile(Small(), backend=look)(torch.ones(1, 3))
    assert type(seen[0]) is torch.Tensor and seen[0].tolist() == [2, 2]


def test_subclasses_of_tensor_stand_aside():
    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("asked")

    x = torch.ones(2).as_subclass(Watched)
    with pytest.raises(AssertionError, match="asked"):
        torch.add(x, 1)
    with dynamo.as_plain_tensors():
        assert torch.add(x, 1).sum().item() == 4


def test_loggers_are_loggers_of_torch():
    import logging

    assert all(name in logging.root.manager.loggerDict for name in dynamo.TRACING_LOGGERS)


@pytest.mark.parametrize(("limit", "raised"), [(8, 64), (100, 100)])
def test_the_limit_of_all_calls_is_raised_and_never_lowered(limit, raised):
    with torch._dynamo.config.patch(recompile_limit=limit):
        dynamo.raise_recompile_limit_of_all(64)
        assert torch._dynamo.config.recompile_limit == raised
