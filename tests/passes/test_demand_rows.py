"""Rows of the last hidden state that nobody reads are not computed; those that are read stay the same."""

import pytest
import torch
import torch.nn.functional as F
from support.hidden_states import PROBES, RATIO, WIDTH, N, P, Stack, both, hidden_states, widths
from support.recording import LATER

from zipvl_compile.passes import demand_rows
from zipvl_compile.passes.graph.op_calls import WindowAttentionCall
from zipvl_compile.pipeline import without

HEAD = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SOME = torch.tensor([19, 3, 4])


def logits(x):
    return F.linear(x, HEAD)


READS = {
    "slice": (lambda x: logits(x[:, -1:]), 1),
    "slice of every axis": (lambda x: logits(x[:, slice(-1, None), :]), 1),
    "after an ellipsis": (lambda x: logits(x[..., -1:, :]), 1),
    "the last one": (lambda x: logits(x[:, -1]), 1),
    "several": (lambda x: logits(x[:, -4:]), 4),
    "one in the middle": (lambda x: logits(x[:, 7, :]), 1),
    "an index": (lambda x: logits(x[:, SOME]), 3),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", READS)
def test_the_last_layer_computes_the_rows_that_are_read(record, form, batch):
    read, rows = READS[form]
    graph, recorder = both(record, Stack(read), hidden_states(batch=batch), **RATIO)
    (demand,) = recorder.demands
    assert not demand.reason
    found = widths(graph)
    assert found["k"] == [N, N] and found["v"] == [P, P]
    assert found["up"] == [N, rows] and found["o"] == [P, rows]
    last = form in ("slice", "slice of every axis", "after an ellipsis", "the last one")
    assert found["q"] == [PROBES, P, PROBES, *([] if last else [P])]  # the last row is one of the probe rows


@pytest.mark.parametrize("batch", [1, 2])
def test_the_last_row_is_computed_where_it_is_no_probe_row(record, batch):
    graph, recorder = both(
        record, Stack(READS["slice"][0]), hidden_states(batch=batch), recent_probes=0, random_probes=PROBES, **RATIO
    )
    assert not recorder.demands[0].reason
    kept = P + 1  # no probe row may see the last token: it is kept by its position, on top
    assert widths(graph)["q"] == [PROBES, kept, PROBES, 1] and widths(graph)["v"] == [kept, kept]


OPTIONS = [{}, {"unselected": "all"}, {"unselected": "hold"}, {"unselected": "window", "window": 3},
           {"unselected": "window", "window": 3, "kept_window": True},
           {"unselected": "all", "window": 3, "kept_window": True}, {"groups": "kv_head"},
           {"evict": "keep"}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_number_of_tokens_that_depends_on_data(record, batch, dynamic, options):
    stack = Stack(READS["slice"][0], bias=True)
    graph, recorder = both(record, stack, hidden_states(batch=batch), dynamic=dynamic, tau=0.6, **options)
    assert not recorder.demands[0].reason and widths(graph)["o"][-1] == 1
    found = WindowAttentionCall.all(graph)
    if "kept_window" in options:
        assert len(found) == 2 and found[-1].queries == "all", "the last layer has one row of it"
    elif "window" in options:
        assert len(found) == 1, "none is left in the last layer"


@pytest.mark.parametrize("unselected", ["window", "all"])
def test_a_last_row_that_sees_its_window_takes_few_queries(record, unselected):
    options = {"unselected": unselected, "window": 3, "kept_window": True}
    graph, recorder = both(record, Stack(READS["slice"][0]), hidden_states(), **RATIO, **options)
    assert not recorder.demands[0].reason
    found = widths(graph)
    assert found["o"] == [N, 1] and found["q"] == [N, PROBES] and found["v"] == [N, N]
    assert recorder.pruned[-1].parts == ("q", "output")


@pytest.mark.parametrize("groups", ["layer", "kv_head"])
@pytest.mark.parametrize("unselected", ["zero", "hold", "window", "kept and window", "union"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("matrix", [False, True], ids=["row", "matrix"])
def test_padding_of_either_side(record, side, matrix, unselected, groups):
    """With padding on the right the last row is no token and is not kept: its attention output is none of its own."""
    mask = torch.ones(2, 1, N, N, dtype=torch.bool).tril()
    mask[0, ..., slice(0, 5) if side == "left" else slice(N - 5, N)] = False
    if matrix:
        mask[:, :, 12:, 2] = False
    stack, x = Stack(READS["slice"][0]), hidden_states(batch=2)
    rules = {
        "kept and window": {"unselected": "window", "kept_window": True},
        "union": {"unselected": "all", "kept_window": True},
    }
    rule = rules.get(unselected, {"unselected": unselected})
    _, recorder = both(record, stack, x, mask, window=3, groups=groups, **rule, **RATIO)
    assert not recorder.demands[0].reason


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", READS)
def test_a_dense_last_layer_computes_the_rows_that_are_read(record, form, batch):
    read, rows = READS[form]
    graph, recorder = both(record, Stack(read), hidden_states(batch=batch), min_tokens=N + 1)
    (demand,) = recorder.demands
    assert not demand.reason
    found = widths(graph)
    last = form in ("slice", "slice of every axis", "after an ellipsis", "the last one")
    assert found["k"] == found["v"] == [N, N] and found["q"] == [N, 1 if last else N]
    assert found["up"] == [N, rows] and found["o"] == [N, rows]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", ["row", "matrix", "one for all samples", "two axes"])
def test_masks_of_a_dense_last_layer(record, form, dynamic):
    mask = torch.ones(N, N, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if form == "row":
        mask = torch.ones(2, 1, 1, N, dtype=torch.bool)
    if form == "one for all samples":
        mask = mask[:1]
    if form == "two axes":
        mask = mask[0, 0]
    mask[..., :5] = False
    options = {"min_tokens": N + 1, "dynamic": dynamic}
    graph, recorder = both(record, Stack(READS["slice"][0]), hidden_states(batch=2), mask, **options)
    assert not recorder.demands[0].reason and widths(graph)["q"] == [N, 1]


def test_a_causal_flag_over_more_keys_than_queries_stays(record):
    """PyTorch counts its causal mask from the first key, so the last query does not see every key."""
    keys = torch.randn(1, 2, N + 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def attend(x):
        q = F.linear(x, weight).view(1, N, 2, 8).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, keys, keys, is_causal=True)
        return (logits(F.silu(F.linear(a.transpose(1, 2).reshape(1, N, WIDTH), weight))[:, -1:]),)

    x = hidden_states()
    torch._dynamo.reset()
    got, recorder = record(attend, x, prune=True)
    torch.testing.assert_close(got[0], attend(x)[0])
    assert len(recorder.demands) == 1 and not recorder.demands[0].reason
    (attention,) = [n for n in recorder.graphs[0].nodes if n.target is F.scaled_dot_product_attention]
    assert attention.meta["example_value"].shape[2] == N


NOT_NARROWED = {
    "returned as well": (lambda x: (logits(x[:, -1:]), x), "read by 'output' as well"),
    "read otherwise": (lambda x: logits(x[:, -1:]) + x.sum(1, keepdim=True)[..., :5], "read by 'sum' as well"),
    "two parts": (lambda x: (logits(x[:, -1:]), x[:, :2]), "read by 'getitem' as well"),
}


@pytest.mark.parametrize("form", NOT_NARROWED)
def test_other_readers_need_every_row(record, form):
    read, reason = NOT_NARROWED[form]

    class Flat(Stack):
        def forward(self, x):
            first, *rest = super().forward(x)
            return *(first if isinstance(first, tuple) else (first,)), *rest

    graph, recorder = both(record, Flat(read), hidden_states(), **RATIO)
    assert all(demand.reason for demand in recorder.demands)
    assert reason in recorder.demands[0].reason and widths(graph)["up"] == [N, N]


UNTOUCHED = {
    "all rows": lambda x: logits(x[:, 0:]),
    "features": lambda x: x[:, :, :5],
    "a mask": lambda x: logits(x[:, torch.arange(N) > 12]),
    "another axis": lambda x: x[-1:],
}


@pytest.mark.parametrize("form", UNTOUCHED)
def test_other_reads_are_no_demand(record, form):
    graph, recorder = both(record, Stack(UNTOUCHED[form]), hidden_states(), **RATIO)
    assert not recorder.demands and widths(graph)["up"] == [N, N]


def test_rows_mixed_after_the_layers(record):
    graph, recorder = both(record, Stack(lambda x: logits(x.cumsum(1)[:, -1:])), hidden_states(), **RATIO)
    assert "'cumsum' may mix tokens" in recorder.demands[0].reason and widths(graph)["up"] == [N, N]


def test_a_tower_without_a_cache_is_left_alone(record):
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    class Tower(Stack):
        def forward(self, x):
            return super().forward(x + F.silu(F.linear(x, weight))[:, -1:])

    _, recorder = both(record, Tower(READS["slice"][0]), hidden_states(), **RATIO)
    assert len(recorder.demands) == 1


def test_what_is_found_are_parts_of_hidden_states_below_an_attention(record):
    _, recorder = record(Stack(READS["slice"][0]), hidden_states(), **RATIO)
    (part,) = demand_rows.find(recorder.graphs[0])
    assert part.index == demand_rows.LAST and part.hidden in part.reader.all_input_nodes


def test_a_fault_of_ours_leaves_every_row_computed(record, monkeypatch):
    def fail(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(demand_rows, "computed_only_for", fail)
    graph, recorder = both(record, Stack(READS["slice"][0]), hidden_states(), **RATIO)
    assert "zipvl failed on it (KeyError: 'a fault of ours')" in recorder.demands[0].reason
    assert widths(graph)["up"] == [N, N]


ONE_ROW = {"read": True, "newest_rows_read": lambda: 1, "decoder_layers": lambda: 2}
RETURNED = {
    "sparse": {},
    "union": {"unselected": "all", "kept_window": True, "window": 3},
    "dense": {"min_tokens": N + 1},
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rule", RETURNED)
def test_of_a_hidden_state_that_is_returned_the_row_that_is_read(record, rule, batch, dynamic):
    """As between a vision-language model and its head, with a graph break between them."""
    options = {**ONE_ROW, **RATIO, **RETURNED[rule]}
    stack, x = Stack(), hidden_states(batch=batch)
    rows = without("read_demands", "demand_rows", "prune_projections", *LATER)
    (expected, *_), _ = record(stack, x, rows=rows, dynamic=dynamic, **options)
    torch._dynamo.reset()
    (got, *_), recorder = record(stack, x, prune=True, dynamic=dynamic, **options)
    assert got.shape == expected.shape and got[:, :-1].isnan().all()
    torch.testing.assert_close(got[:, -1], expected[:, -1], rtol=1e-12, atol=1e-12)
    assert widths(recorder.graphs[0])["up"][-1] == 1 and [demand.reason for demand in recorder.demands] == [""]


@pytest.mark.parametrize("count", [0, 16])
def test_a_hidden_state_of_which_more_is_read_is_returned_in_full(record, count):
    options = {**ONE_ROW, "newest_rows_read": lambda: count, **RATIO}
    (got, *_), recorder = record(Stack(), hidden_states(), prune=True, **options)
    assert got.isfinite().all() and recorder.demands == []


def test_a_hidden_state_whose_rows_are_mixed_is_returned_in_full(record):
    options = {**ONE_ROW, **RATIO}
    (got, *_), recorder = record(Stack(lambda x: x.cumsum(1)), hidden_states(), prune=True, **options)
    assert got.isfinite().all() and recorder.demands[0].reason == "'cumsum' may mix tokens"
    assert widths(recorder.graphs[0])["up"] == [N, N]


@pytest.mark.parametrize("layers", [3, 1, None])
def test_a_hidden_state_between_two_layers_is_returned_in_full(record, layers):
    """As between the first layers of Qwen3-VL, where features of the vision tower are added after a graph break."""
    options = {**ONE_ROW, "decoder_layers": lambda: layers, **RATIO}
    (got, *_), recorder = record(Stack(), hidden_states(), prune=True, **options)
    assert got.isfinite().all() and recorder.demands == []


def test_a_hidden_state_beside_others_is_returned_in_full(record):
    """As of a decoder that is asked for hidden states, of which the embedding comes before any attention."""

    class WithEmbedding(Stack):
        def forward(self, x):
            return *super().forward(x), x * 1

    (got, *_), recorder = record(WithEmbedding(), hidden_states(), prune=True, **ONE_ROW, **RATIO)
    assert got.isfinite().all() and recorder.demands == []
