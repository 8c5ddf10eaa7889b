"""Masks that are written to, calls in every spelling, look-alikes of other libraries, and rules that fail."""

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import Wrapped, trace

from zipvl_compile.passes.graph.op_traits import NAMES
from zipvl_compile.passes.masks import index_rules, mask_form
from zipvl_compile.passes.masks.index_expr import KEY, QUERY
from zipvl_compile.passes.masks.index_rules import formula_of

N = 9


def triangle():
    return torch.ones(N, N, dtype=torch.bool).tril()


def additive():
    return torch.full((N, N), float("-inf"), dtype=torch.float64).triu(1)


@torch.library.custom_op("testlib::hide_key", mutates_args=("mask",))
def hide_key(mask: torch.Tensor, key: int) -> None:
    mask[:, key] = False


@torch.library.custom_op("testlib::where", mutates_args=())
def foreign_where(condition: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, no, yes)  # the other way round


@foreign_where.register_fake
def _(condition, yes, no):
    return torch.empty_like(yes.expand_as(condition))


# Each hides keys that a causal mask shows, through another kind of view or call.
CHANGES = {
    "diagonal": lambda m: m.diagonal(-1).fill_(False),
    "select": lambda m: m.select(1, 2).fill_(False),
    "unbind": lambda m: m.unbind(1)[2].fill_(False),
    "split": lambda m: m.split(3, dim=1)[1][3:].zero_(),
    "chunk": lambda m: m.chunk(3, dim=1)[1][3:].zero_(),
    "swapaxes": lambda m: m.swapaxes(0, 1)[2].fill_(False),
    "transpose": lambda m: m.t()[2].zero_(),
    "narrow": lambda m: m.narrow(1, 1, 2).zero_(),
    "view of a view": lambda m: m.unsqueeze(0).flatten()[N + 1 :: N + 1].view(-1)[2:4].zero_(),
    "setitem": lambda m: m.__setitem__((slice(None), 2), False),
    "augmented": lambda m: m.__iand__(torch.arange(N) != 2),
    "out": lambda m: torch.logical_and(m, torch.arange(N) != 2, out=m),
    "packet": lambda m: torch.ops.aten.logical_and_(m, torch.arange(N) != 2),
    "overload": lambda m: torch.ops.aten.fill_.Scalar(m[:, 2], False),
    "function of the class": lambda m: torch.Tensor.fill_(m[:, 2], False),
    "another library": lambda m: hide_key(m, 2),
}


def attend(make):
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=make(q))

    return attention


def cached(modules, make):
    def attention(q, k, v):
        return modules.attend(q, k, v, "plain", attn_mask=make(q)), *modules.cache(k, v)

    return Wrapped(attention)


def check(record, modules, make):
    """Return what the graph's mask was read as, after a check that tau=1 gives what eager gives."""
    q, k, v = modules.qkv(N, kv_heads=4)
    (out, *_), recorder = record(cached(modules, make), q, k, v, tau=1.0)
    torch.testing.assert_close(out, attend(make)(q, k, v), rtol=1e-12, atol=1e-12)
    (site,) = recorder.sites[0].prefill
    assert site.rewritten, site.reason
    return site.mask


@pytest.mark.parametrize("change", CHANGES)
def test_a_mask_that_is_changed_in_place_is_read_as_it_is(record, modules, change):
    def make(q):
        mask = triangle()
        CHANGES[change](mask)
        return mask

    form = check(record, modules, make)
    assert mask_form.UNKNOWN in form.parts, f"read as {form}"


def test_inplace_arguments_are_writes(record, modules):
    def make(q):
        mask = additive()
        F.relu(mask, inplace=True)
        return mask

    assert mask_form.UNKNOWN in check(record, modules, make).parts


def test_a_write_before_the_mask_is_made_of_it_is_part_of_it(record, modules):
    """What is computed from a tensor after the last write to it is not changed by that."""

    def make(q):
        row = torch.ones(N, dtype=torch.bool)
        row[:2] = False
        row = torch.logical_or(row, torch.arange(N) == 0)
        return triangle() & row

    form = check(record, modules, make)
    assert mask_form.CAUSAL in form.parts


SPELLINGS = {
    "where other": lambda q: torch.where(triangle(), 0.0, other=torch.tensor(float("-inf"))).double(),
    "where input other": lambda q: torch.where(triangle(), input=torch.zeros(N, N), other=torch.tensor(-1e9)).double(),
    "where of a tensor": lambda q: torch.zeros(N, N).where(triangle(), torch.tensor(float("-inf"))).double(),
    "arange end": lambda q: torch.arange(0, end=N)[None] <= torch.arange(0, N, step=1)[:, None],
    "arange start end": lambda q: torch.arange(start=0, end=N)[None] <= torch.arange(end=N)[:, None],
    "add other": lambda q: torch.arange(N)[None] < torch.add(torch.arange(N)[:, None], other=1),
    "masked_fill": lambda q: torch.zeros(N, N).masked_fill(mask=~triangle(), value=float("-inf")).double(),
    "transpose": lambda q: torch.ones(N, N, dtype=torch.bool).triu().transpose(dim0=0, dim1=1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_arguments_are_read_by_name(record, modules, spelling):
    form = check(record, modules, SPELLINGS[spelling])
    assert form.parts == (mask_form.CAUSAL,) and not form.needs_matrix, f"read as {form}"


NOT_CAUSAL = {
    "arange from five": (lambda q: torch.arange(5, end=5 + N)[None] <= torch.arange(N)[:, None] + 4, "window"),
    "subtracted twice": (lambda q: torch.sub(torch.arange(N)[None], torch.arange(N)[:, None], alpha=2) <= 0, "alpha"),
    "rounded": (lambda q: torch.div(torch.arange(N)[None], 2, rounding_mode="floor") <= torch.arange(N)[:, None], ""),
}


@pytest.mark.parametrize("case", NOT_CAUSAL)
def test_arguments_that_change_the_meaning_are_not_overlooked(record, modules, case):
    def make(q):
        return NOT_CAUSAL[case][0](q) | torch.eye(N, dtype=torch.bool)

    assert check(record, modules, make).parts != (mask_form.CAUSAL,)


def test_what_only_has_the_name_of_an_operation_is_not_read_as_it(record, modules):
    def make(q):
        return foreign_where(triangle(), torch.full((N, N), float("-inf")), torch.zeros(N, N)).double()

    assert mask_form.UNKNOWN in check(record, modules, make).parts


@pytest.mark.parametrize("error", [ValueError, KeyError, ZeroDivisionError, AssertionError])
def test_a_rule_that_fails_is_a_mask_that_is_not_understood(record, modules, monkeypatch, error):
    def broken(*_):
        raise error("a fault of ours")

    monkeypatch.setitem(index_rules.RULES, "tril", broken)
    assert mask_form.UNKNOWN in check(record, modules, lambda q: triangle()).parts


def test_every_rule_is_for_an_operation_of_the_table():
    assert set(index_rules.RULES) <= NAMES


def test_formulas():
    def function(x):
        rows = torch.arange(x.shape[0])
        return (rows[:, None] - rows[None]) * 2 + 1

    (result,) = trace(function, torch.zeros(7)).output_node().args[0]
    assert formula_of(result).value == 2 * (QUERY - KEY) + 1
