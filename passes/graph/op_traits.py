"""What operations do: one table, keyed by what a graph calls.

A node calls a function, a method of a tensor, or an operator overload, and the table is asked for that very object,
never for its name: a foreign function that happens to be called `softmax` is not in it. What the table does not know is
refused wherever it matters, and may have written to everything that it was given.

    where(c, a, other=b)    x.where(c, b)    aten.where.self(c, a, b)       one Op, arguments by name
    x += y    x.add_(y)    torch.add(x, y, out=x)                           what they write to

The table says how the token axis goes through an operation and what is known of the values of its rows; the rules
themselves stand in `tokenwise/`. What an operation computes at one index stands in `masks/index_rules.py`, by its name.
"""

from __future__ import annotations

import builtins
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from zipvl_compile.passes.graph.experts import RoutedExperts
from zipvl_compile.passes.graph.op_kinds import Op, Tokens, Values
from zipvl_compile.passes.graph.private import (
    ADD_BATCH_DIM,
    NATIVE,
    REMOVE_BATCH_DIM,
    TENSOR,
    OpOverload,
    OpOverloadPacket,
)

Target = Callable[..., Any] | str
TABLE: dict[Target, Op] = {}
NAMES: set[str] = set()
# What aten, NumPy and single functions call an argument that has another name in the table.
SYNONYMS = {"self": "input", "train": "training", "axis": "dim", "keepdims": "keepdim", "tensor": "input",
            "split_size_or_sections": "split_size", "mat2": "other", "axis0": "dim0", "axis1": "dim1",
            "shape": "size", "mat_a": "input", "mat_b": "other"}  # fmt: skip
_OPERATORS = {name.strip("_"): name for name in (
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "invert", "le", "lt", "matmul", "mod", "mul", "ne",
    "neg", "or_", "pow", "setitem", "sub", "truediv", "xor",
)}  # fmt: skip
_MODULES = (torch, F, torch.Tensor, *NATIVE)


def _row(names: str, arguments: str, tokens: Tokens | None = None, values: Values = Values.UNKNOWN, *,
         functions: tuple[Any, ...] = (), signatures: dict[Any, str] | None = None, writes: tuple[str, ...] = (),
         **flags: Any) -> None:  # fmt: skip
    """Add the operations `names`, each with its in-place form, wherever PyTorch has them; the first name counts."""
    given = {target: tuple(text.split()) for target, text in (signatures or {}).items()}
    for group in names.split(", "):
        name, *also = group.split("/")
        takes = tuple(arguments.split())
        op = Op(name, takes, tokens, values, writes=writes, signatures=given, **flags)
        copies = tokens if tokens is Tokens.COPY else None
        in_place = Op(f"{name}_", takes, copies, writes=(takes[0],), signatures=given)
        NAMES.update((op.name, in_place.name))
        for spelling in (name, *also):
            TABLE.update(dict.fromkeys((*_targets(spelling), *_operators(spelling, _OPERATORS.get(spelling))), op))
            in_operator = f"i{spelling}" if spelling in _OPERATORS else None
            TABLE.update(dict.fromkeys((*_targets(f"{spelling}_"), *_operators(f"i{spelling}", in_operator)), in_place))
        TABLE.update(dict.fromkeys((*functions, *given), op))


def _targets(name: str) -> Iterator[Target]:
    """Return the functions, methods and packets of overloads that PyTorch has under a name."""
    for module in _MODULES:
        found = getattr(module, name, None)
        if callable(found) and not isinstance(found, type):
            yield found
    if hasattr(torch.Tensor, name):
        yield name
    if isinstance(packet := getattr(torch.ops.aten, name, None), OpOverloadPacket):
        yield packet


def _operators(name: str, in_operator: str | None) -> Iterator[Target]:
    """Return the function of Python's operator module, and the method that stands for it."""
    if in_operator is not None and hasattr(operator, in_operator):
        yield getattr(operator, in_operator)
        yield f"__{name}__"


T, V = Tokens, Values
_BOTH = ("out", "values", "indices")  # where an operation returns two
_row("neg, sqrt, erf, floor, ceil, round, sign, exp, log, log2, exp2, expm1", "input", T.POINTWISE, V.MONOTONE)
_row("abs, square", "input", T.POINTWISE, V.EVEN)
_row("sin, cos", "input", T.POINTWISE, V.CURVE)
_row("rsqrt, reciprocal", "input", T.POINTWISE, V.POLE)
_row("isnan, isinf, isfinite, logical_not", "input", T.POINTWISE, V.UNIT)
_row("bitwise_not/invert", "input", T.POINTWISE)
_row("silu", "input inplace", T.FIRST, V.CURVE)
_row("relu", "input inplace", T.FIRST, V.MONOTONE)
_row("tanh, sigmoid, softplus", "input", T.FIRST, V.MONOTONE)
_row("gelu", "input approximate", T.FIRST, V.CURVE)
_row("to/_to_copy, type", "input *dtype", T.FIRST, V.KEPT, view=True)
_row("float, double, half, bfloat16", "input", T.FIRST, V.KEPT, view=True)
_row("bool, int, long", "input", T.FIRST, view=True)
_row("type_as", "input other", T.FIRST, V.KEPT, view=True, typed=("other",))
_row("contiguous", "input memory_format", T.FIRST, V.KEPT, view=True)
_row("clone", "input", T.POINTWISE, V.KEPT)
_row("detach", "input", T.POINTWISE, V.KEPT, view=True)
_row("add, sub/subtract", "input other alpha", T.POINTWISE, V.TERMS)
_row("rsub", "input other alpha", T.POINTWISE, V.TERMS)
_row("mul/multiply, maximum, minimum", "input other", T.POINTWISE, V.TERMS)
_row("div/truediv/true_divide/divide", "input other rounding_mode", T.POINTWISE, V.QUOTIENT)
_row("floor_divide/floordiv, remainder/mod, bitwise_and/and, bitwise_or/or, bitwise_xor/xor,"
     " logical_and, logical_or, logical_xor", "input other")  # fmt: skip
_row("lt/less, le/less_equal, gt/greater, ge/greater_equal, eq, ne/not_equal", "input other", T.POINTWISE, V.UNIT)
_row("pow", "input exponent", T.POINTWISE, V.POWER)
_row("clamp/clip", "input min max", T.POINTWISE, V.MONOTONE)
_row("where", "condition input other", T.POINTWISE, V.KEPT, signatures={"where": "input condition other"})
_row("masked_fill", "input mask value", T.POINTWISE, V.KEPT)
_row("dropout", "input p training inplace", T.DROPOUT, V.KEPT, view=True)
_row("linear", "input weight bias", T.FEATURES, V.LINEAR)
_row("view_as_complex", "input", T.FEATURES, view=True)
_row("view_as_real", "input", T.FIRST, view=True)
_row("layer_norm", "input normalized_shape weight bias eps", T.NORM, V.NORM)
_row("rms_norm", "input normalized_shape weight eps", T.NORM, V.NORM)
_row("matmul, mm/_int_mm", "input other", T.MATMUL, V.LINEAR)
_row("addmm", "input mat1 other beta alpha", T.MATMUL, V.LINEAR)
_row("bmm", "input other")
_row("baddbmm", "input batch1 batch2 beta alpha")
_row("einsum", "equation *operands", view=True)
_row("softmax/_softmax", "input dim dtype", T.ALONG, V.UNIT, signatures={F.softmax: "input dim _stacklevel dtype"})
_row("topk", "input k dim largest sorted", T.ALONG, outs=_BOTH)
_row("gather", "input dim index", T.CHOOSE)
_row("scatter", "input dim index src", T.CHOOSE)
_row("mean", "input dim keepdim", T.REDUCE, V.MEAN)
_row("sum", "input dim keepdim", T.REDUCE, V.SUM)
_row("var", "input dim unbiased keepdim correction", T.REDUCE, V.SPREAD)
_row("amax, amin", "input dim keepdim", T.REDUCE, V.KEPT)
_row("transpose/swapaxes/swapdims", "input dim0 dim1", T.TRANSPOSE, V.KEPT, view=True)
_row("permute", "input *dims", T.PERMUTE, V.KEPT, view=True)
_row("view/_unsafe_view, reshape", "input *size", T.RESHAPE, V.KEPT, view=True)
_row("flatten", "input start_dim end_dim", T.RESHAPE, V.KEPT, view=True)
_row("unflatten", "input dim sizes", T.RESHAPE, V.KEPT, view=True)
_row("unsqueeze, squeeze", "input dim", T.RESHAPE, V.KEPT, view=True)
_row("expand", "input *size", T.EXPAND, V.KEPT, view=True)
_row("split", "input split_size dim", T.CUT, V.KEPT, view=True)
_row("chunk", "input chunks dim", T.CUT, V.KEPT, view=True)
_row("unbind", "input dim", T.UNBIND, V.KEPT, view=True)
_row("narrow", "input dim start length", view=True)
_row("getitem", "input index", T.GETITEM, V.KEPT, view=True)
_row("cat/concat/concatenate", "tensors dim", T.CAT, V.KEPT)
_row("stack", "tensors dim", T.STACK, V.KEPT)
_row("repeat_interleave", "input repeats dim", T.REPEAT, V.KEPT)
_row("new_empty, new_zeros, new_ones", "input *size", T.FRESH)
_row("copy", "input src", T.COPY)
_row("arange", "start end step")
_row("ones, zeros, empty", "*size")
_row("ones_like, zeros_like", "input", T.FIRST, V.MONOTONE)
_row("empty_like", "input")
_row("sort", "input dim descending stable", outs=_BOTH)
_row("argsort", "input dim descending stable")
_row("histc", "input bins min max")
_row("cumsum", "input dim dtype")
_row("index_select", "input dim index")
_row("grouped_mm/_grouped_mm", "input other offs bias out_dtype")
_row("full", "size fill_value")
_row("new_full", "input size fill_value")
_row("full_like", "input fill_value", T.FIRST, V.MONOTONE)
_row("scalar_tensor", "data")
_row("tensor", "data", functions=TENSOR)
_row("triu, tril", "input diagonal")
_row("index", "input indices")
_row("scaled_dot_product_attention", "query key value attn_mask dropout_p is_causal scale enable_gqa")
_row("size, stride, dim, numel, sym_size, sym_numel", "input dim", sizes=True)
_row("getattr", "input name", functions=(builtins.getattr,), view=True)
_row("setitem", "input index value", writes=("input",))
_row("index_copy_", "input dim index source", writes=("input",))
_row("meshgrid, broadcast_tensors", "*tensors", view=True)
_row("embedding, interpolate, normalize, one_hot, pad, conv2d, conv3d, group_norm, log_softmax, as_tensor", "input",
     view=True)  # fmt: skip
_row("add_batch_dim", "input dim level", functions=ADD_BATCH_DIM, view=True, effect=True)
_row("remove_batch_dim", "input level size out_dim", functions=REMOVE_BATCH_DIM, view=True, effect=True)
# Operators of other libraries, by the names of their schemas: a product with a weight of int8 and its scales; one of
# runs of rows, each with a weight of its own; a sum over ranks, and what waits for it.
_FOREIGN = {
    "quanto::qbytes_mm": Op("qbytes_mm", ("input", "weights", "output_scales"), T.FEATURES, V.LINEAR),
    "transformers::grouped_mm_fallback": Op("grouped_mm", ("input", "other", "offs")),
    "_c10d_functional::all_reduce": Op("all_reduce", ("input", "reduce_op", "group_name"), T.FIRST, V.SUM),
    "_c10d_functional::wait_tensor": Op("wait_tensor", ("input",), T.FIRST, V.KEPT, view=True),
}
NAMES.update(op.name for op in _FOREIGN.values())
EXPERTS = Op("routed_experts", ("*tensors",), Tokens.EXPERTS)
NAMES.add(EXPERTS.name)


@functools.cache
def of_target(target: Target) -> Op | None:
    """Return what a call does, or None where nobody knows.

    PyTorch's operations that are not in the table, and operators of other libraries, are known by their schemas: what
    they write to, and nothing of their tokens.
    """
    if target in TABLE:
        return TABLE[target]
    if isinstance(target, RoutedExperts):
        return EXPERTS
    packet = getattr(target, "overloadpacket", None)
    if packet in TABLE:
        return TABLE[packet]
    schemas = _schemas(target)
    if not schemas:
        return None
    if schemas[0].name in _FOREIGN:
        return _FOREIGN[schemas[0].name]
    written = [a for schema in schemas for a in schema.arguments if _is_written(a)]
    inputs, outs = ({SYNONYMS.get(a.name, a.name) for a in written if a.kwarg_only is only} for only in (False, True))
    code = getattr(target, "__code__", None)
    named = code.co_varnames[: code.co_argcount] if code else [a.name for a in max(schemas, key=_size).arguments]
    takes = tuple(SYNONYMS.get(name, name) for name in named)
    # Custom operators return tensors of their own; aten's composite ones may return a view and not say so.
    view = schemas[0].name.startswith("aten::") and not inputs
    return Op(schemas[0].name, takes, view=view, writes=tuple(inputs), outs=tuple(outs))


def _size(schema: Any) -> int:
    return len(schema.arguments)


def _is_written(argument: Any) -> bool:
    writes = argument.alias_info is not None and argument.alias_info.is_write
    return writes and str(argument.type).startswith(("Tensor", "Optional[Tensor]", "List[Tensor]"))


def _schemas(target: Target) -> list[Any]:
    """Return the schemas of an overload, of a packet, or of PyTorch's own function or method of the same name."""
    if isinstance(target, OpOverload):
        return [target._schema]
    packet: Any = target
    if isinstance(target, str):
        packet = getattr(torch.ops.aten, target, None) if hasattr(torch.Tensor, target) else None
    elif not isinstance(target, OpOverloadPacket):
        name = getattr(target, "__name__", "")
        own = any(getattr(module, name, None) is target for module in _MODULES)
        packet = getattr(torch.ops.aten, name, None) if own else None
    if not isinstance(packet, OpOverloadPacket):
        return []
    return [getattr(packet, name)._schema for name in packet.overloads()]
