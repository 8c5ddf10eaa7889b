"""The table of operations against PyTorch itself: arguments, memory that is shared, writes, and rows of zeros."""

import operator

import pytest
import torch
import torch.nn.functional as F

from zipvl_compile.passes.graph.op_kinds import Tokens
from zipvl_compile.passes.graph.op_traits import NAMES, SYNONYMS, TABLE, of_target
from zipvl_compile.passes.graph.private import OpOverloadPacket
from zipvl_compile.passes.tokenwise.axis_rules import RULES

# Python and aten differ in how these are called, or aten has the arguments of its own forward only.
CALLED_OTHERWISE = {
    "to", "type", "tensor", "full", "layer_norm", "rms_norm", "softmax", "var", "dropout", "embedding", "interpolate",
    "one_hot", "pad", "group_norm", "log_softmax", "conv2d", "conv3d", "size", "stride", "dim", "numel", "setitem",
    "split", "arange", "gelu", "scaled_dot_product_attention", "sym_size", "sym_numel", "bool", "int", "long",
    "meshgrid", "broadcast_tensors", "silu", "relu", "where", "scalar_tensor", "einsum", "floor_divide", "as_tensor",
}  # fmt: skip
PACKETS = {target: op for target, op in TABLE.items() if isinstance(target, OpOverloadPacket)}


def names_of(schema):
    return [SYNONYMS.get(argument.name, argument.name) for argument in schema.arguments if not argument.kwarg_only]


@pytest.mark.parametrize("packet", PACKETS, ids=str)
def test_arguments_stand_in_the_order_of_the_schema(packet):
    """Some overload takes the arguments of the table, as far as both go, under the same names and in the same order."""
    op = PACKETS[packet]
    if op.name.rstrip("_") in CALLED_OTHERWISE:
        pytest.skip("called otherwise from Python; covered by the tests of the rules")
    takes = [name.strip("*") for name in op.arguments]
    overloads = [getattr(packet, name)._schema for name in packet.overloads()]
    found = [names_of(schema) for schema in overloads]
    assert any(all(a == b for a, b in zip(takes, names, strict=False)) for names in found), (takes, found)


def written(schema):
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type) and a.alias_info is not None]
    return {SYNONYMS.get(a.name, a.name) for a in tensors if a.alias_info.is_write}


@pytest.mark.parametrize("packet", PACKETS, ids=str)
def test_writes_are_those_of_the_schema(packet):
    op = PACKETS[packet]
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if str(overload._schema.arguments[0].type).startswith("List"):
            continue  # of Python's lists
        known = {*op.writes, *op.outs} | ({"values", "indices"} if "out" in overload._overloadname else set())
        assert written(overload._schema) <= known, overload


def test_names_are_unique_and_rules_exist_for_every_way_of_carrying_tokens():
    assert {op.name for op in TABLE.values()} <= NAMES
    assert set(RULES) == set(Tokens)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
SHARING = {
    "view": lambda x: x.view(6, 4), "reshape": lambda x: x.reshape(24), "flatten": torch.flatten,
    "unflatten": lambda x: x.unflatten(1, (2, 3)), "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.squeeze(0), "expand": lambda x: x.expand(2, 4, 6), "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0), "split": lambda x: x.split(2), "chunk": lambda x: x.chunk(2),
    "unbind": lambda x: x.unbind(0), "narrow": lambda x: x.narrow(0, 1, 2), "getitem": lambda x: x[1:],
    "to": lambda x: x.to(torch.float32), "float": lambda x: x.float(), "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(), "detach": lambda x: x.detach(),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "view_as_complex": lambda x: torch.view_as_complex(x.view(4, 3, 2)), "getattr": lambda x: x.mT,
    "einsum": lambda x: torch.einsum("ij->ji", x), "meshgrid": lambda x: torch.meshgrid(x[0], indexing="ij"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARING)
def test_operations_that_may_return_their_input_are_views(name):
    found = SHARING[name](X)
    first = found[0] if isinstance(found, (tuple, list)) else found
    assert first.untyped_storage().data_ptr() == X.untyped_storage().data_ptr(), "the case shows no shared memory"
    assert all(op.view for op in TABLE.values() if op.name == name)


def fresh():
    other = torch.randn(4, 6)
    return {
        "add": X + other, "mul": X * other, "neg": -X, "cat": torch.cat([X, other]), "stack": torch.stack([X, other]),
        "clone": X.clone(), "linear": F.linear(X, other), "matmul": X @ other.T, "softmax": X.softmax(-1),
        "masked_fill": X.masked_fill(X > 0, 0.0), "where": torch.where(X > 0, X, other), "tril": X.tril(),
        "repeat_interleave": X.repeat_interleave(1, 0), "layer_norm": F.layer_norm(X, (6,)), "silu": F.silu(X),
    }  # fmt: skip


def test_operations_that_are_no_views_return_memory_of_their_own():
    for name, result in fresh().items():
        assert result.untyped_storage().data_ptr() != X.untyped_storage().data_ptr(), name
        assert not any(op.view for op in TABLE.values() if op.name == name), name


@torch.library.custom_op("testlib_traits::softmax", mutates_args=())
def foreign(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("testlib_traits::fill", mutates_args=("x",))
def writer(x: torch.Tensor, value: float) -> None:
    x.fill_(value)


def softmax(x):
    return x


def test_only_pytorchs_own_objects_are_in_the_table():
    assert of_target(softmax) is None and of_target(len) is None
    assert of_target(operator.index) is None and of_target(operator.concat) is None, "not aten's index and concat"
    assert of_target("item_that_tensors_lack") is None
    known = of_target(torch.ops.testlib_traits.softmax.default)
    assert known.name == "testlib_traits::softmax" and known.tokens is None and not known.view and not known.writes
    assert of_target(torch.ops.testlib_traits.fill.default).writes == ("x",)
    assert of_target(torch.ops.testlib_traits.fill).writes == ("x",), "a packet, as Dynamo records it"


@pytest.mark.parametrize(
    ("target", "name", "writes"),
    [
        (operator.add, "add", ()), (operator.iadd, "add_", ("input",)), ("__iadd__", "add_", ("input",)),
        (operator.and_, "bitwise_and", ()), ("__and__", "bitwise_and", ()), (operator.iand, "bitwise_and_", ("input",)),
        (operator.truediv, "div", ()), (operator.floordiv, "floor_divide", ()), (operator.invert, "bitwise_not", ()),
        (operator.setitem, "setitem", ("input",)), (torch.relu_, "relu_", ("input",)),
        (torch.Tensor.add_, "add_", ("input",)), (torch.ops.aten.add_.Tensor, "add_", ("input",)),
        ("scatter_", "scatter_", ("input",)), ("fill_", "aten::fill_", ("input",)),
        (torch.cumsum, "cumsum", ()), (torch.cumprod, "aten::cumprod", ()),
        (F.linear, "linear", ()), (F.gelu, "gelu", ()), (torch.functional.split, "split", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "") or "",
)  # fmt: skip
def test_one_operation_in_every_spelling(target, name, writes):
    op = of_target(target)
    assert op.name == name and op.writes == writes


def test_results_that_are_given_are_outs():
    assert of_target(torch.sort).outs and set(of_target(torch.sort).outs) >= {"values", "indices"}
    assert of_target(torch.add).outs == ("out",)
