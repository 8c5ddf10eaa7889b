"""What may be given rows of zeros, and what may not."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import trace

from zipvl_compile.passes.graph.reading import is_op
from zipvl_compile.passes.tokenwise import zero_rows

X = torch.randn(2, 7, 8, dtype=torch.float64)
W, B = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)


@torch.library.custom_op("testlib_zero_rows::unknown", mutates_args=())
def unknown(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@unknown.register_fake
def _(x):
    return torch.empty_like(x)


def refusal(function, x=X):
    """Return what is said of zero rows of the sine of x, which stands for an attention's output."""
    graph = trace(lambda x: function(x.sin(), x), x)
    return zero_rows.refusal(next(node for node in graph.nodes if is_op(node, "sin")), 1)


def rms(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def half(x):
    return rms(x.half(), 1e-8).to(x.dtype)


def flat(a):
    return torch.addmm(B, a.view(-1, 8), W).view(a.shape)


def heads(a):
    return a.view(2, 7, 2, 4).transpose(1, 2).contiguous().transpose(1, 2).reshape(2, 7, 8)


def written(a):
    a = F.linear(a, W)
    a.mul_(2)
    return a


TAKES = {
    "linear": lambda a, x: x + F.linear(a, W), "bias": lambda a, x: x + F.linear(a, W, B),
    "gate": lambda a, x: x + a * torch.sigmoid(x), "norm": lambda a, x: x + rms(a, 1e-6),
    "norm of a bias": lambda a, x: x + rms(F.linear(a, W, B), 1e-6),
    "layer norm": lambda a, x: x + F.layer_norm(a, (8,)),
    "flat": lambda a, x: x + flat(a), "in half precision": lambda a, x: x + rms(a.half(), 1e-4).double(),
    "scaled with an epsilon": lambda a, x: x + a / a.abs().amax(-1, keepdim=True).clamp(min=1e-5),
    "into the residual": lambda a, x: (x * 1).add_(a), "into the output": lambda a, x: a.add_(x),
    "divided by a row": lambda a, x: x + a / x,
    "heads": lambda a, x: x + heads(a),
    "square as a product": lambda a, x: x + a / ((a * a).sum(-1, keepdim=True) + 1).sqrt(),
    "size only": lambda a, x: x + a.shape[1], "back in its dtype": lambda a, x: x + rms(a.float(), 1e-6).type_as(a),
    "dtype only": lambda a, x: x + x.float().type_as(a),
}  # fmt: skip
REFUSES = {
    "no epsilon": (lambda a, x: x + rms(a, 0.0), "'rsqrt' may divide a row of zeros by zero"),
    "an epsilon that half precision loses": (lambda a, x: x + half(a), "'rsqrt' may divide"),
    "a bias": (lambda a, x: x + rms(F.linear(a, W, B), 0.0), "'rsqrt' may divide"),
    "scaled": (lambda a, x: x + a / a.abs().amax(-1, keepdim=True), "'truediv' may divide"),
    "native norm": (lambda a, x: x + F.rms_norm(a, (8,), eps=0.0), "'rms_norm' may divide"),
    "logarithm": (lambda a, x: x + a.log(), "'log' of a row of zeros is not finite"),
    "exponential": (lambda a, x: x + (a + 1e4).exp(), "'exp' of a row of zeros is not finite"),
    "unknown": (lambda a, x: x + unknown(a), "may mix tokens"),
    "scaled by all": (lambda a, x: x + a / a.abs().amax(), "'amax' may mix tokens"),
    "written to": (lambda a, x: x + written(a), "changes a tensor in place"),
    "returned": (lambda a, x: a, "a graph break lies below"),
    "hidden with infinity": (lambda a, x: x + a.masked_fill(x > 0, -torch.inf).softmax(-1), "'masked_fill' of a row"),
    "rows multiplied": (lambda a, x: x + F.linear(F.linear(a, a[0]), W[:, :7]), "'linear' works along the tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKES)
def test_rows_of_zeros_stay_finite(case):
    assert refusal(TAKES[case]) == ""


@pytest.mark.parametrize("case", REFUSES)
def test_what_may_not_be_given_zeros_says_why(case):
    function, why = REFUSES[case]
    assert re.search(why, refusal(function))


OF_ITSELF = [case for case in TAKES if case not in ("divided by a row", "size only", "dtype only")]


@pytest.mark.parametrize("case", OF_ITSELF)
def test_the_proof_is_true(case):
    """A row of zeros in the place of the attention's output gives a finite row."""
    a = X.sin()
    a[:, 3] = 0
    assert TAKES[case](a, X.clone())[:, 3].isfinite().all()
