"""A linear whose weight is a tensor subclass is row-wise, and takes zeros, where all that its library computes does."""

import pytest
import torch
from support.graph_modules import trace
from torch import nn

from zipvl_compile.passes.graph.reading import arguments, holds_subclass, is_op, spelled
from zipvl_compile.passes.tokenwise import row_values
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.opaque_weight import walk
from zipvl_compile.passes.tokenwise.split_projections import split
from zipvl_compile.passes.tokenwise.token_axis import carried


class Weight(torch.Tensor):
    """A weight that computes its linear with a function of its own, as quantised ones do."""

    @staticmethod
    def __new__(cls, inner, function):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner, function):
        self.inner, self.function = inner, function

    def __tensor_flatten__(self):
        return ["inner"], self.function

    @staticmethod
    def __tensor_unflatten__(tensors, function, size, stride):
        return Weight(tensors["inner"], function)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return weight.function(x, weight.inner, (kwargs or {}).get("bias", *bias[:1] or (None,)))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner, args[0].function)
        raise NotImplementedError(func)


def plain(x, weight, bias):
    y = x.reshape(-1, x.shape[-1]) @ weight.t()
    y = y.reshape(*x.shape[:-1], -1)
    if bias is not None:
        y += bias
    return y


def each_row(x, weight, bias):
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return plain((x / step).round() * step, weight, bias)


def each_row_without_epsilon(x, weight, bias):
    step = x.abs().amax(-1, keepdim=True) / 127
    return plain((x / step).round() * step, weight, bias)


def all_rows(x, weight, bias):
    step = x.abs().amax() / 127
    return plain((x / step).round() * step, weight, bias)


def each_sample(x, weight, bias):
    step = x.abs().amax((-1, -2), keepdim=True) / 127
    return plain((x / step).round() * step, weight, bias)


def turned(x, weight, bias):
    """Rows that are put together otherwise than they were taken apart."""
    y = plain(x, weight, None).reshape(-1, weight.shape[0])
    return y.t().reshape(-1, weight.shape[0]).reshape(x.shape[0], x.shape[1], -1)


def unknown(x, weight, bias):
    return plain(x.cumsum(1), weight, bias)


def untraceable(x, weight, bias):
    """Reads the subclass again, which has nothing for it."""
    return plain(x, Weight(weight, plain).exp(), bias)


def linear_of(function, batch=2, bias=False, dynamic=False):
    module = nn.Linear(6, 4, bias=bias)
    module.weight = nn.Parameter(Weight(module.weight.detach(), function), requires_grad=False)
    with torch.no_grad():
        graph = trace(module, torch.randn(batch, 7, 6), dynamic=dynamic)
    return next(node for node in graph.nodes if is_op(node, "linear"))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("function", [plain, each_row, each_row_without_epsilon])
def test_row_by_row(function, bias, batch, dynamic):
    linear = linear_of(function, batch, bias, dynamic)
    assert holds_subclass(linear)
    x = arguments(linear)["input"]
    assert carried(linear, 0) == {x: 0} and carried(linear, 1) == {x: 1}
    with pytest.raises(Mixes, match="works along the tokens"):
        carried(linear, 2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("function", "why"),
    [(all_rows, "works along the tokens"), (each_sample, "works along"), (unknown, "may mix tokens")],
)
def test_what_may_mix_rows(function, why, batch):
    with pytest.raises(Mixes, match=f"weight of type Weight.*{why}"):
        carried(linear_of(function, batch), 1)


def test_what_cannot_be_traced():
    linear = linear_of(plain)
    weight = arguments(linear)["weight"]
    weight.meta["example_value"].function = untraceable
    with pytest.raises(Mixes, match="weight of type Weight cannot be traced"):
        carried(linear, 1)


def test_rows_that_are_put_together_otherwise():
    with pytest.raises(Mixes, match="weight of type Weight"):
        carried(linear_of(turned), 1)


def test_rows_of_zeros():
    def zeros(function, bias=False):
        linear = linear_of(function, bias=bias)
        return row_values.below(linear, {arguments(linear)["input"]: row_values.ZERO})

    assert zeros(plain) == zeros(each_row) == row_values.ZERO
    assert zeros(plain, bias=True) == row_values.ANY
    with pytest.raises(Mixes, match=r"weight of type Weight.*may divide a row of zeros by zero"):
        zeros(each_row_without_epsilon)


def test_the_states_of_what_is_computed():
    linear = linear_of(plain, bias=True)
    assert "add" in walk(linear, ("x",), lambda node, given: (*max(given.values()), spelled(node)))


def test_other_operations_with_such_a_weight_are_refused():
    weight = Weight(torch.randn(4, 6), plain)
    linear = linear_of(plain)
    assert not split(linear), "parts of the weight may not be taken"
    linear.target = torch.add
    with pytest.raises(Mixes, match=r"'add' .*subclass|may mix tokens"):
        carried(linear, 1)
    assert type(weight) is Weight
