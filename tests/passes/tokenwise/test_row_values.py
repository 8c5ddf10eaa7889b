"""What is said of the values of a row holds for every row that it is computed from."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graph_modules import trace

from zipvl_compile.passes.graph.op_kinds import Values
from zipvl_compile.passes.graph.op_traits import TABLE
from zipvl_compile.passes.tokenwise import row_values
from zipvl_compile.passes.tokenwise.axis_rules import Mixes

W, B = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
# Every operation whose values the table knows, as a function of a row.
OPERATIONS = {
    "neg": torch.neg, "abs": torch.abs, "square": torch.square, "sqrt": torch.sqrt, "erf": torch.erf, "sin": torch.sin,
    "cos": torch.cos, "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "sign": torch.sign,
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2,
    "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "isnan": torch.isnan, "isinf": torch.isinf,
    "isfinite": torch.isfinite, "logical_not": torch.logical_not, "silu": F.silu, "relu": F.relu, "gelu": F.gelu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "to": lambda x: x.to(torch.float32),
    "type": lambda x: x.type(torch.float32), "float": lambda x: x.float(), "double": lambda x: x.double(),
    "half": lambda x: x.half(), "bfloat16": lambda x: x.bfloat16(), "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(), "clone": torch.clone, "detach": lambda x: x.detach(),
    "add": lambda x: x + 0.3, "sub": lambda x: 2 - x, "rsub": lambda x: torch.rsub(x, 2, alpha=3),
    "mul": lambda x: x * -3, "maximum": lambda x: torch.maximum(x, x), "minimum": lambda x: torch.minimum(x, x * x),
    "div": lambda x: 1 / x, "lt": lambda x: x < 0, "le": lambda x: x <= 0, "gt": lambda x: x > 0,
    "ge": lambda x: x >= 0, "eq": lambda x: x == 0, "ne": lambda x: x != 0, "pow": lambda x: x**2,
    "clamp": lambda x: x.clamp(min=-0.5, max=0.7), "where": lambda x: torch.where(x > 0, x, 0.5),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.25), "dropout": lambda x: F.dropout(x, 0.5, False),
    "linear": lambda x: F.linear(x, W), "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), eps=1e-6), "matmul": lambda x: x @ W, "mm": lambda x: torch.mm(x, W),
    "addmm": lambda x: torch.addmm(B, x, W), "softmax": lambda x: x.softmax(-1), "mean": lambda x: x.mean(-1),
    "sum": lambda x: x.sum(-1), "var": lambda x: x.var(-1), "amax": lambda x: x.amax(-1), "amin": lambda x: x.amin(-1),
    "transpose": lambda x: x.transpose(0, 1), "permute": lambda x: x.permute(1, 0), "view": lambda x: x.view(-1, 3, 2),
    "reshape": lambda x: x.reshape(-1, 2, 3), "flatten": lambda x: x.flatten(0), "unsqueeze": lambda x: x.unsqueeze(1),
    "unflatten": lambda x: x.unflatten(1, (2, 3)), "squeeze": lambda x: x.squeeze(0),
    "expand": lambda x: x.expand(2, 1, 6), "split": lambda x: x.split(3, -1), "chunk": lambda x: x.chunk(2, -1),
    "unbind": lambda x: x.unbind(1), "getitem": lambda x: x[:, 1:],
    "cat": lambda x: torch.cat((x, 1 / (x * x + 1)), -1),
    "stack": lambda x: torch.stack((x, x), 1), "repeat_interleave": lambda x: x.repeat_interleave(2, -1),
    "ones_like": torch.ones_like, "zeros_like": torch.zeros_like, "full_like": lambda x: torch.full_like(x, 7.0),
}  # fmt: skip
MORE = {
    "its square": lambda x: x * x, "fourth power": lambda x: x**4, "a root": lambda x: x**0.5,
    "inverse square": lambda x: x**-2, "inverse cube": lambda x: x**-3, "third power": lambda x: x**3,
    "divided": lambda x: x / 3, "by itself": lambda x: x / (x + 2.5),
    "a norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6),
    "scaled": lambda x: x / x.abs().amax(-1, True), "a product": lambda x: (x + 1) * (x - 1),
    "centred": lambda x: x - x.mean(-1, True),
    "in half precision": lambda x: torch.rsqrt(x.half().square() + 1e-8), "a bias": lambda x: F.linear(x, W, B).exp(),
    "a matrix of int8": lambda x: (x.round().clamp(-2, 2).to(torch.int8) + 1).float(),
    "masked by infinity": lambda x: x.masked_fill(x > 0, -math.inf), "large": lambda x: x.half() * 1e5,
}  # fmt: skip
GRAPHS = {}


def below(name, interval):
    """Return what is said of the result of an operation; its graph is traced once."""
    if name not in GRAPHS:
        GRAPHS[name] = trace(OPERATIONS.get(name) or MORE[name], torch.randn(1, 6, dtype=torch.float64))
    graph, known = GRAPHS[name], {}
    for node in graph.nodes:
        given = {x: known[x] for x in node.all_input_nodes if x in known}
        if node.op == "placeholder" and node.meta["example_value"].shape == (1, 6):
            known[node] = interval
        elif node.op == "output":
            return next(iter(given.values()))
        elif given:
            known[node] = row_values.below(node, given)


ENDS = st.sampled_from([-2.0, -1.0, -0.25, 0.0, 0.25, 1.0, 2.0])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from([*OPERATIONS, *MORE]), ends=st.tuples(ENDS, ENDS), seed=st.integers(0, 9))
def test_every_value_is_in_the_interval(name, ends, seed):
    low, high = min(ends), max(ends)
    try:
        least, most = below(name, (low, high))
    except Mixes:
        return
    row = low + (high - low) * torch.rand(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row[0, :2] = torch.tensor([low, high])
    results = (OPERATIONS.get(name) or MORE[name])(row)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.isfinite().all() and (result >= least).all() and (result <= most).all(), (name, row, result)


def test_every_operation_that_the_table_knows_is_tried():
    known = {op.name for op in TABLE.values() if op.values is not Values.UNKNOWN}
    assert known == set(OPERATIONS)


ZERO = {
    **dict.fromkeys(("linear", "matmul", "rms_norm", "layer_norm", "a norm", "mul", "sum", "var"), (0.0, 0.0)),
    "centred": (0.0, 0.0),
    "exp": (1.0, 1.0), "add": (0.3, 0.3), "addmm": row_values.ANY, "softmax": (0.0, 1.0), "by itself": (0.0, 0.0),
    "a matrix of int8": (1.0, 1.0), "full_like": (7.0, 7.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ZERO)
def test_a_row_of_zeros_becomes(name):
    assert below(name, (0.0, 0.0)) == ZERO[name]


@pytest.mark.parametrize(
    "name", ["log", "rsqrt", "reciprocal", "div", "scaled", "inverse square", "masked by infinity"]
)
def test_a_row_of_zeros_is_refused(name):
    with pytest.raises(Mixes, match="row of zeros"):
        below(name, (0.0, 0.0))


def test_an_epsilon_that_half_precision_rounds_away():
    with pytest.raises(Mixes, match="'rsqrt' may divide a row of zeros by zero"):
        below("in half precision", (0.0, 0.0))


def test_what_is_too_large_for_its_dtype():
    with pytest.raises(Mixes, match="not finite"):
        below("large", (1.0, 2.0))
