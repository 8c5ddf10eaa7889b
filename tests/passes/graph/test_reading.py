"""What a node calls, its arguments by name, what it writes to, and which memory is written after it was computed."""

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import trace

from zipvl_compile.passes.graph.private import fake_mode_of, leaves
from zipvl_compile.passes.graph.reading import (
    arguments,
    changed_in_place,
    example,
    is_op,
    is_pure,
    of,
    same_shape,
    shared,
    spelled,
    written,
)

X = torch.randn(4, 6)


def nodes(function, *inputs, **named):
    return [n for n in trace(function, *(inputs or (X,)), **named).nodes if n.op.startswith("call")]


def last(function, *inputs):
    return nodes(function, *inputs)[-1]


CALLS = {
    "where": (lambda x: torch.where(x > 0, x, other=-x), {"condition", "input", "other"}),
    "where method": (lambda x: x.where(x > 0, -x), {"condition", "input", "other"}),
    "pow": (lambda x: torch.pow(x, exponent=2), {"input", "exponent"}),
    "matmul": (lambda x: torch.matmul(x, other=x.T), {"input", "other"}),
    "view": (lambda x: x.view(6, 4), {"input", "size"}),
    "view of a tuple": (lambda x: x.view((6, 4)), {"input", "size"}),
    "permute": (lambda x: x.permute(dims=(1, 0)), {"input", "dims"}),
    "numpy's names": (lambda x: torch.sum(x, axis=1, keepdims=True), {"input", "dim", "keepdim"}),
    "dropout": (lambda x: torch.dropout(x, 0.5, train=False), {"input", "p", "training"}),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x), {"equation", "operands"}),
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_have_names(case):
    function, names = CALLS[case]
    given = arguments(last(function))
    assert names <= set(given)
    if "size" in names:
        assert given["size"] == (6, 4)
    if case == "where method":
        assert is_op(given["condition"], "gt") and given["input"].op == "placeholder" and is_op(given["other"], "neg")


def test_too_many_arguments_are_an_error():
    node = last(lambda x: torch.neg(x))
    node.args = (*node.args, 1, 2)
    with pytest.raises(TypeError, match="'neg' has 3 arguments, expected at most 1"):
        arguments(node)


def test_names_that_the_table_lacks_are_an_error_of_the_caller():
    with pytest.raises(AssertionError, match="not in the table"):
        is_op(last(torch.neg), "negg")


def test_calls_of_what_is_no_tensor_are_nothing():
    size = next(node for node in nodes(lambda x: x.view(x.size(0), -1)) if node.target == "view")
    assert of(size.all_input_nodes[0]) is None or not of(size.all_input_nodes[0]).writes
    assert of(None) is None and of(3) is None and of(X) is None


def writes_of(function):
    return [spelled(node) for node in nodes(function) if written(node)]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x.clone().add_(1), ["add_"]),
        (lambda x: torch.add(x, 1, out=torch.empty(4, 6)), ["add"]),
        (lambda x: F.relu(x.clone(), inplace=True), ["relu"]),
        (lambda x: F.hardtanh(x.clone(), -1.0, 1.0, True), ["hardtanh"]),
        (lambda x: F.relu(x.clone(), inplace=False), []),
        (lambda x: x.clone().masked_fill_(x > 0, 0.0), ["masked_fill_"]),
    ],
    ids=range(6),
)
def test_what_a_call_writes_to(function, names):
    found = writes_of(function)
    assert names == [name for name in found if name in names] and len(found) == len(names)


def test_what_nobody_knows_may_have_written_to_everything():
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["example_value"] = X
    unknown = graph.call_function(len, (x, y))
    assert written(unknown) == [x, y] and not is_pure(unknown)
    assert changed_in_place(x)


def changed(function):
    """Return whether the graph changes the first result after it was computed."""
    graph = trace(function, X)
    return changed_in_place(graph.output_node().args[0][0])


def through(view):
    def function(x):
        base = x.clone()
        part = base[1:]
        view(base).fill_(0.0)
        return part, base

    return function


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.diagonal(), lambda x: x.select(0, 1), lambda x: x.unbind(0)[2], lambda x: x.split(2)[1],
        lambda x: x.chunk(2)[0], lambda x: x.swapaxes(0, 1), lambda x: x.T, lambda x: x.view(6, 4),
        lambda x: x.to(X.dtype),
        lambda x: x.detach(), lambda x: torch.dropout(x, 0.5, False), lambda x: x,
    ],
    ids=range(12),
)  # fmt: skip
def test_writes_through_any_view_of_the_same_memory_count(view):
    assert changed(through(view))


def test_writes_before_do_not_count_and_copies_are_memory_of_their_own():
    def before(x):
        base = x.clone()
        base.diagonal().fill_(0.0)
        return base[1:], base

    def copied(x):
        base = x.clone()
        part = base[1:].clone()
        base.fill_(0.0)
        return part, base

    assert not changed(before) and not changed(copied)


def test_shared_memory():
    view, product = nodes(lambda x: x.view(6, 4) * 2)
    assert shared(view) == [view.args[0]] and shared(product) == []


def test_shapes_fakes_and_leaves():
    node = last(lambda x: x * 2)
    assert same_shape(example(node).shape, (4, 6)) and not same_shape((4,), (4, 6))
    assert fake_mode_of([1, example(node)]) is example(node).fake_mode and fake_mode_of([1]) is None
    assert leaves({"a": [1, (2, 3)]}) == [1, 2, 3]
