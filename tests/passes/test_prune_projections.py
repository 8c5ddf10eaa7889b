"""Pruned projections: the same numbers as without pruning, from fewer tokens; nothing else is pruned.

Path one computes every projection for every token; path two runs the graph after `demand_rows` and `prune_projections`.
"""

import pytest
import torch
import torch.nn.functional as F
from support.hidden_states import (
    PROBES,
    RATIO,
    WIDTH,
    Layer,
    N,
    P,
    RMSNorm,
    Stack,
    both,
    hidden_states,
    layer,
    widths,
)

from zipvl_compile.passes.graph.reading import example, is_op
from zipvl_compile.passes.prune_projections import EVERY_TOKEN
from zipvl_compile.passes.tokenwise import backward_slice
from zipvl_compile.passes.tokenwise.row_select import Shared

ALL = ("q", "v", "output")


def reasons(recorder):
    (pruning,) = recorder.pruned
    return pruning.reasons


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("batch", [1, 2])
def test_projections_see_the_kept_tokens_only(record, fused, bias, batch):
    graph, recorder = both(record, Stack(fused=fused, bias=bias), hidden_states(batch=batch), **RATIO)
    assert [pruning.parts for pruning in recorder.pruned] == [ALL, ALL]
    kv = {"qkv": sorted([P, PROBES, N, P] * 2)} if fused else {"q": [PROBES, P] * 2, "k": [N] * 2, "v": [P] * 2}
    found = widths(graph)
    once = [1] if bias else []  # the row of every token without attention
    assert found.pop("o") == [P, *once] * 2 and found.pop("up") == [N] * 2
    assert {name: sorted(rows) if fused else rows for name, rows in found.items()} == kv


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("inner", [None, "aot_eager", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_number_of_tokens_that_depends_on_data(record, batch, inner, dynamic):
    _, recorder = both(record, Stack(bias=True), hidden_states(batch=batch), dynamic=dynamic, inner=inner, tau=0.6)
    assert [pruning.parts for pruning in recorder.pruned] == [ALL, ALL]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_keys_of_a_layer_that_does_not_select(record, bias):
    graph, recorder = both(record, Stack(layers=4, bias=bias), hidden_states(), score_every=3, **RATIO)
    assert [pruning.parts for pruning in recorder.pruned] == [ALL] * 4
    assert [pruning.keys for pruning in recorder.pruned] == [None, "", "", None]
    assert widths(graph)["k"] == [N, P, P, N] and "k" in recorder.pruned[1].done.split(", ")


def test_keys_that_something_else_reads_are_computed_for_every_token(record):
    """With `evict="keep"` the cache holds all of them."""
    _, recorder = both(record, Stack(layers=2), hidden_states(), score_every=2, evict="keep", **RATIO)
    assert recorder.pruned[1].keys and "k" in recorder.pruned[1].for_every_token


def test_padding_masks(record):
    mask = torch.ones(N, N, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :5] = False
    _, recorder = both(record, Stack(), hidden_states(batch=2), mask, **RATIO)
    assert recorder.pruned[0].parts == ALL


def gate(a, h):
    return a * torch.sigmoid(F.linear(h, torch.eye(WIDTH, dtype=h.dtype).roll(1, 0)))


NORM = RMSNorm().double()
FOLLOWING = {
    "gate": {"attended": gate},
    "gate and bias": {"attended": gate, "bias": True},
    "post norm": {"projected": RMSNorm().double()},
    "post norm and bias": {"projected": RMSNorm().double(), "bias": True},
    "post norm that casts back": {"projected": lambda x: NORM(x * 2).type_as(x)},
    "layer norm": {"projected": lambda x: F.layer_norm(x, (WIDTH,), bias=torch.ones(WIDTH, dtype=x.dtype))},
    "constant": {"projected": lambda x: torch.cos(x) + 2.0},
    "flattened": {"projected": lambda x: NORM(x.reshape(-1, WIDTH)).view(x.shape)},
    "flattened and bias": {"projected": lambda x: torch.cos(x.flatten(0, 1)).view(x.shape) + 2.0},
    "left flattened": {
        "projected": lambda x: x.view(-1, WIDTH).cos(),
        "residual": lambda x, a: (x.view(-1, WIDTH) + a).view(x.shape),
    },
    "dropout at rest": {"projected": lambda x: F.dropout(x, 0.5, training=False)},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FOLLOWING)
def test_rows_of_tokens_without_attention_are_exact(record, form, batch):
    graph, recorder = both(record, Stack(layers=1, **FOLLOWING[form]), hidden_states(batch=batch), **RATIO)
    assert recorder.pruned[0].parts == ALL, recorder.pruned[0]
    assert P in widths(graph)["o"] and N not in widths(graph)["o"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FOLLOWING)
def test_rows_that_are_held_are_exact(record, form, batch):
    graph, recorder = both(
        record, Stack(layers=1, **FOLLOWING[form]), hidden_states(batch=batch), unselected="hold", **RATIO
    )
    if "gate" in form:  # each token has its own, so that rows below it are no copies
        assert reasons(recorder) == {"output": "'mul' meets a tensor with tokens of its own"}
        assert widths(graph)["o"] == [N]
    else:
        assert recorder.pruned[0].parts == ALL
        assert widths(graph)["o"] == [P + 1], "the first token is always kept, on top"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2])
def test_held_rows_of_a_number_of_tokens_that_depends_on_data(record, batch, dynamic):
    stack, x = Stack(bias=True), hidden_states(batch=batch)
    _, recorder = both(record, stack, x, dynamic=dynamic, tau=0.6, unselected="hold")
    assert [pruning.parts for pruning in recorder.pruned] == [ALL, ALL]


@pytest.mark.parametrize(("unselected", "kept_window"), [("window", False), ("window", True), ("all", True)])
def test_rows_that_attend_to_a_window_need_every_projection(record, unselected, kept_window):
    rule = {"unselected": unselected, "kept_window": kept_window}
    graph, recorder = both(record, layer(), hidden_states(), **rule, **RATIO)
    assert set(reasons(recorder).values()) == {"every token attends to its window"}
    assert widths(graph) == {name: [N] for name in ("q", "k", "v", "o", "up")}


def test_heads_with_tokens_of_their_own_need_every_projection(record):
    graph, recorder = both(record, layer(), hidden_states(), groups="kv_head", **RATIO)
    assert set(reasons(recorder).values()) == {"each KV head keeps tokens of its own"}
    assert widths(graph) == {name: [N] for name in ("q", "k", "v", "o", "up")}


RESIDUALS = {
    "sum": (lambda x, a: x + a, True),
    "sum the other way": (lambda x, a: a + x, True),
    "two sums": (lambda x, a: (x + a) * (2 * x + a), True),
    "in another dtype": (lambda x, a: (x.float() + a).double(), False),
    "twice": (lambda x, a: torch.add(x, a, alpha=2), False),
    "difference": (lambda x, a: x - a, False),
    "in place": (lambda x, a: (x * 1).add_(a), False),
    "of a sum that is written to": (lambda x, a: (x + a).mul_(2), False),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", RESIDUALS)
def test_a_residual_gets_the_sums_in_its_kept_rows(record, form, batch):
    residual, in_rows = RESIDUALS[form]
    graph, recorder = both(record, Stack(layers=1, residual=residual), hidden_states(batch=batch), **RATIO)
    assert recorder.pruned[0].parts == ALL
    zeros = [x for x in graph.nodes if "new_zeros" in str(x.target) and example(x).shape == (batch, N, WIDTH)]
    assert in_rows == (not zeros)


NOT_PRUNED = {
    "values mix tokens": ({"values": lambda v: v.cumsum(1)}, "v", "'cumsum' may mix tokens"),
    "values along the tokens": ({"values": lambda v: v.softmax(1)}, "v", "works along the tokens"),
    "values are written to": ({"values": lambda v: v.mul_(2)}, "v", "changed in place"),
    "queries mix tokens": ({"queries": lambda q: q.roll(1, 1)}, "q", "'roll' may mix tokens"),
    "output mixes tokens": ({"attended": lambda a, h: a.cumsum(1)}, "output", "'cumsum' may mix tokens"),
    "output meets tokens": ({"attended": lambda a, h: a + h}, "output", "tokens of its own"),
    "output is dropped at random": ({"attended": lambda a, h: F.dropout(a, 0.5, True)}, "output", "draws at random"),
}


@pytest.mark.parametrize("form", NOT_PRUNED)
def test_what_is_not_token_by_token_stays_dense_and_says_why(record, form):
    changes, part, reason = NOT_PRUNED[form]
    module, x = layer(**changes), hidden_states()
    if "random" in form:
        recorder = record(module, x, prune=True, **RATIO)[1]
    else:
        _, recorder = both(record, module, x, **RATIO)
    parts = set(ALL) if recorder.sites[0].prefill[0].needs_true_rows else {part}
    assert set(reasons(recorder)) == parts and reason in reasons(recorder)[part]
    assert widths(recorder.graphs[0])[part[0]] == [N]


def test_a_convolution_before_the_projection_is_where_rows_are_taken(record):
    """Mixing tokens above the projection is no obstacle: it stays dense, and its rows are taken."""
    kernel = torch.randn(WIDTH // 2, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(WIDTH // 2, WIDTH // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def convolved(v):
        return F.linear(F.conv1d(v.transpose(1, 2), kernel, padding=1, groups=WIDTH // 2).transpose(1, 2), weight)

    graph, recorder = both(record, layer(values=convolved), hidden_states(), **RATIO)
    assert not reasons(recorder) and widths(graph)["v"] == [N]
    assert sorted(rows[0] for name, rows in widths(graph).items() if name not in ("q", "k", "v", "o", "up")) == [P]


class ReadsValues(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.total, self.layer = None, layer(values=self.keep)

    def keep(self, v):
        self.total = v.sum(1)
        return v

    def forward(self, x):
        out, stored = self.layer(x)
        return out, self.total, stored


def test_values_that_something_else_reads(record):
    graph, recorder = both(record, ReadsValues(), hidden_states(), **RATIO)
    assert set(reasons(recorder)) == {"v"} and widths(graph)["v"] == [N]


class Writes(Layer):
    """Writes to what its projections read, after the attention; `shared` is a view that all of them read."""

    shared = False

    def project(self, h):
        self.written = h * 1.0
        h = self.written.view(h.shape) if self.shared else h
        return self.q(h), self.k(h), self.v(h if self.shared else self.written)

    def forward(self, x):
        out, stored = super().forward(x)
        return out + self.written.mul_(3), stored


@pytest.mark.parametrize("shared", [False, True], ids=["itself", "through a view"])
def test_hidden_states_that_are_written_to_later(record, shared):
    """Rows taken after the write would be other rows."""
    module = Writes().double()
    module.shared = shared
    _, recorder = both(record, module, hidden_states(), **RATIO)
    assert set(reasons(recorder)) == ({"q", "v"} if shared else {"v"})
    assert all("changed in place" in reason for reason in reasons(recorder).values())


def test_every_query_attends(record):
    graph, recorder = both(record, layer(), hidden_states(), unselected="all", **RATIO)
    assert reasons(recorder) == {"q": "every query attends", "output": "every query attends"}
    assert widths(graph) == {"q": [N], "k": [N], "v": [P], "o": [N], "up": [N]}


def test_a_full_cache_needs_every_value(record):
    graph, recorder = both(record, layer(), hidden_states(), evict="keep", **RATIO)
    assert reasons(recorder) == {"v": "read by 'gather_tokens' as well"}
    assert widths(graph)["v"] == [N] and widths(graph)["o"] == [P]


def test_where_every_token_is_kept_nothing_changes(record):
    x = hidden_states()
    _, plain = record(layer(), x, tau=1.0, keep_ratio=None)
    torch._dynamo.reset()
    _, pruned = record(layer(), x, tau=1.0, keep_ratio=None, prune=True)
    assert set(reasons(pruned).values()) == {"every token is kept"}
    assert len(plain.graphs[0].nodes) == len(pruned.graphs[0].nodes)


def test_an_operation_that_does_not_take_some_tokens_is_computed_for_all(record, monkeypatch):
    """As a linear whose weight is a tensor subclass, with an unbacked number of tokens: nothing half done is left."""
    real = backward_slice.propagate

    def fail(node):
        if is_op(node, "linear"):
            raise TypeError("an unbacked size meets a tensor subclass")
        real(node)

    monkeypatch.setattr(backward_slice, "propagate", fail)
    graph, recorder = both(record, layer(), hidden_states(), **RATIO)
    why = "'linear' cannot be computed for some tokens (TypeError: an unbacked size meets a tensor subclass)"
    assert reasons(recorder) == dict.fromkeys(ALL, why)
    assert widths(graph)["q"] == widths(graph)["o"] == [N]


def test_whatever_fake_values_raise_is_a_reason(record, monkeypatch):
    def fail(rows, x, axes, before):
        raise NotImplementedError("no rows of this one")

    monkeypatch.setattr(Shared, "_take", fail)
    graph, recorder = both(record, layer(), hidden_states(), **RATIO)
    assert set(reasons(recorder)) == set(ALL)
    assert all("NotImplementedError: no rows of this one" in reason for reason in reasons(recorder).values())
    assert widths(graph)["q"] == widths(graph)["o"] == [N]


def test_where_every_token_is_kept_nothing_is_pruned(record):
    graph, recorder = both(record, layer(), hidden_states(), keep_ratio=1.0)
    assert reasons(recorder) == dict.fromkeys(ALL, EVERY_TOKEN)
    assert widths(graph) == {name: [N] for name in ("q", "k", "v", "o", "up")}
