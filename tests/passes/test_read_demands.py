"""Rows whose hidden states are read are kept, on top of p, and attend in every layer; or else every query attends."""

import pytest
import torch
import torch.nn.functional as F
from support.hidden_states import RATIO, WIDTH, N, P, Stack, hidden_states, without_spare
from torch import nn

from zipvl_compile.passes import read_demands
from zipvl_compile.passes.match.outcome import Demanded

HEAD = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SOME = torch.tensor([3, 4, -9])
ROUTER = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def logits(x):
    return F.linear(x, HEAD)


def stack(read):
    """Return a stack; every call gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Stack(read)


def sparse(record, read, *others, batch=1, **options):
    """Return outputs, kept positions of each layer, and what counts as read, of a stack that the pass looks at."""
    out, recorder = record(stack(read), hidden_states(batch=batch), *others, read=True, **RATIO | options)
    assert all(site.rewritten for site in recorder.sites[0].prefill)
    return out, [kept for _, _, kept in out[1:]], recorder.sites[0].demanded


def same(got, expected):
    torch.testing.assert_close(without_spare(got, N), without_spare(expected, N), rtol=0, atol=0)


LAST = {
    "slice": lambda x: logits(x[:, -1:]),
    "index": lambda x: logits(x[:, -1]),
    "of the logits": lambda x: logits(x)[:, -1:],
}


@pytest.mark.parametrize("form", LAST)
def test_where_the_newest_row_is_read_nothing_changes(record, form):
    got, _, read = sparse(record, LAST[form])
    assert read == Demanded() and str(read) == ""
    torch._dynamo.reset()
    expected, _ = record(stack(LAST[form]), hidden_states(), **RATIO)
    same(got, expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prune", [False, True], ids=["", "pruned"])
def test_the_newest_rows_are_those_of_keep_recent(record, batch, prune):
    got, kept, read = sparse(record, lambda x: logits(x[:, -4:]), batch=batch, prune=prune)
    assert read.newest == 4 and "rows slice(-4, None, None)" in str(read)
    assert all(one.shape[2] == P + 3 and one[..., -4:].tolist() == [[[16, 17, 18, 19]]] * batch for one in kept)
    torch._dynamo.reset()
    expected, _ = record(
        stack(lambda x: logits(x[:, -4:])), hidden_states(batch=batch), keep_recent=4, prune=prune, **RATIO
    )
    same(got, expected)


def test_keep_recent_is_not_lowered(record):
    _, kept, _ = sparse(record, lambda x: logits(x[:, -2:]), keep_recent=5)
    assert all(one.shape[2] == P + 4 for one in kept)


POSITIONS = {
    "an index tensor": (lambda x: logits(x[:, SOME]), {3, 4, N - 9}),
    "a row in the middle": (lambda x: logits(x[:, 7]), {7}),
    "a slice in the middle": (lambda x: logits(x[:, 3:6]), {3, 4, 5}),
    "from the end": (lambda x: logits(x[:, -9:-7]), {N - 9, N - 8}),
    "two parts": (lambda x: logits(x[:, 7]) + logits(x[:, 3]), {3, 7}),
    "a part and the newest": (lambda x: logits(x[:, 7]) + logits(x[:, -3:])[:, 0], {7, N - 3, N - 2, N - 1}),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", POSITIONS)
def test_rows_anywhere_are_kept_on_top_of_p_and_attend(record, form, dynamic):
    read, rows = POSITIONS[form]
    got, kept, demanded = sparse(record, read, dynamic=dynamic, prune=True)
    assert not demanded.every and str(demanded)
    plain = record(stack(lambda x: logits(x[:, -1:])), hidden_states(), **RATIO)[0][1][2]
    first = set(kept[0].flatten().tolist())
    assert first >= rows | set(plain.flatten().tolist()), "nothing that the rule keeps is displaced"
    assert all(set(one.flatten().tolist()) >= rows for one in kept)
    assert all(one.shape[2] == P + len(rows - {N - 1}) for one in kept)
    whole, _ = record(stack(read), hidden_states(), tau=1.0)
    assert (got[0] - whole[0]).abs().max() < (whole[0] - logits(hidden_states())[:, :1]).abs().max() / 2


def test_a_number_of_rows_that_changes_with_the_call(record):
    class Scored(Stack):
        def forward(self, x, count):
            self.read = lambda h: logits(h[:, -count:])
            return super().forward(x)

    f = Scored()
    _, recorder = record(f, hidden_states(), 3, read=True, dynamic=True, **RATIO)
    for count in (3, 5, 8):
        out = recorder.compiled(hidden_states(), count)
        kept = out[1][2]
        assert out[0].shape[1] == count and kept.shape[2] == P + count - 1
        assert kept[0, 0, -count:].tolist() == [*range(N - count, N)]
    assert len(recorder.graphs) == 1


class InPlace(Stack):
    """Writes its hidden states into a buffer, through a view of it."""

    def forward(self, x):
        out, *caches = super().forward(x)
        buffer = torch.zeros(2, N, WIDTH, dtype=x.dtype)
        buffer[0].copy_(out[0])
        return buffer, *caches


EVERY = {
    "the hidden state": lambda x: x,
    "its logits": logits,
    "a sum over all": lambda x: logits(x[:, -1]) + x.sum(1)[:, :5],
    "the loss": lambda x: F.cross_entropy(logits(x[:, :-1])[0], torch.zeros(N - 1, dtype=torch.long)),
    "all from a position on": lambda x: logits(x[:, 2:]),
    "a mask": lambda x: logits(x[:, torch.arange(N) > 12]),
    "another row of each sample": lambda x: logits(x[torch.arange(1), SOME[:1]]),
    "rows that come from the hidden states": lambda x: logits(x[:, (x[0, :4] @ ROUTER).long() % N]),
}


@pytest.mark.parametrize("form", EVERY)
def test_where_all_rows_are_read_every_query_attends(record, form):
    got, kept, read = sparse(record, EVERY[form])
    assert read.every and str(read).startswith("every query attends: ")
    assert all(one.shape[2] == P for one in kept)
    torch._dynamo.reset()
    expected, _ = record(stack(EVERY[form]), hidden_states(), unselected="all", **RATIO)
    same(got, expected)


@pytest.mark.parametrize("kept_window", [False, True])
def test_where_all_rows_are_read_a_window_stays_and_kept_tokens_are_seen_besides(record, kept_window):
    rule = {"window": 3, "sinks": 2}
    got, _, read = sparse(record, EVERY["its logits"], unselected="window", kept_window=kept_window, **rule)
    assert read.every
    torch._dynamo.reset()
    module, x = stack(EVERY["its logits"]), hidden_states()
    expected, _ = record(module, x, unselected="all", kept_window=True, **rule, **RATIO)
    same(got, expected)
    torch._dynamo.reset()
    without, _ = record(module, x, unselected="all", **RATIO)
    assert not torch.allclose(expected[0], without[0]), "a window must matter in this case"


def test_a_write_through_a_view_is_a_read(record):
    _, recorder = record(InPlace(), hidden_states(), read=True, **RATIO)
    assert recorder.sites[0].demanded.every


class Routed(Stack):
    """An expert for some tokens after the last layer, chosen by what they hold; then the newest row."""

    def forward(self, x):
        out, *caches = super().forward(x)
        rows = (out[0] @ ROUTER).topk(5).indices
        added = torch.zeros_like(out).index_add(1, rows, F.silu(out[:, rows]))
        return logits((out + added)[:, -1:]), *caches


def test_tokens_that_a_router_sends_to_an_expert_are_no_demand(record):
    _, recorder = record(Routed(), hidden_states(), read=True, **RATIO)
    assert recorder.sites[0].demanded == Demanded()


class Windowed(nn.Module):
    """A layer whose cache is none of ours, as that of a sliding window, after one whose cache is."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(layers=1)

    def forward(self, x):
        h, cache = self.stack(x)
        q = h.view(1, N, 2, 8).transpose(1, 2)
        keys = torch.cat([q.new_zeros(1, 2, 0, 8), q], 2)
        h = h + F.scaled_dot_product_attention(q, keys, keys, is_causal=True).transpose(1, 2).reshape(1, N, WIDTH)
        return logits(h[:, -1:]), keys[:, :, -5:], cache


def test_what_other_caches_store_is_no_demand(record):
    _, recorder = record(Windowed(), hidden_states(), read=True, **RATIO)
    assert recorder.sites[0].demanded == Demanded()


def test_a_mask_of_its_own_form_keeps_rows_by_position(record):
    """No probe row sees the tokens of a chunk that is neither theirs nor the last: not all visible tokens are new."""
    chunk = torch.arange(N) // 5
    mask = torch.ones(N, N, dtype=torch.bool).tril() & (chunk[:, None] == chunk)
    mask[:15, 12] = False
    options = {"recent_probes": 5, "random_probes": 0}
    _, kept, _ = sparse(record, lambda x: logits(x[:, -8:]), mask[None, None], **options)
    assert all(one[0, 0, -8:].tolist() == [*range(12, 20)] for one in kept)


def test_where_no_recent_row_measures_the_row_that_is_read_is_kept(record):
    _, kept, _ = sparse(record, lambda x: logits(x[:, -1:]), recent_probes=0, random_probes=6)
    assert all(one[0, 0, -1] == N - 1 for one in kept)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_those_who_get_the_hidden_state_say_what_they_read(record, count):
    asked = []

    def newest_rows_read():
        asked.append(1)
        return count

    _, kept, read = sparse(record, lambda x: x, newest_rows_read=newest_rows_read)
    assert asked and bool(read.every) == (count == 0) and read.newest == max(count, 1)
    assert all(one.shape[2] == P + max(count, 1) - 1 for one in kept)
    torch._dynamo.reset()
    asked.clear()
    sparse(record, lambda x: logits(x[:, -1:]), newest_rows_read=newest_rows_read)
    assert not asked, "the graph says it itself"


def test_two_tensors_that_leave_are_read_in_full(record):
    class Both(Stack):
        def forward(self, x):
            out, *caches = super().forward(x)
            return out, out * 2, *caches

    _, recorder = record(Both(), hidden_states(), read=True, newest_rows_read=lambda: 1, **RATIO)
    assert recorder.sites[0].demanded.every


def test_a_fault_of_ours_has_every_query_attend(record, monkeypatch):
    def fail(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(read_demands, "demanded", fail)
    _, _, read = sparse(record, lambda x: logits(x[:, -1:]))
    assert "a fault of ours" in read.every
