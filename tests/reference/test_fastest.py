"""The measured choice between implementations: who wins, for which inputs, and what is remembered."""

import contextlib

import pytest
import torch

from zipvl_compile.kernels.common import autotune as fastest


@pytest.fixture
def clock(monkeypatch):
    """Replace CUDA events by the durations that candidates leave behind, in milliseconds."""
    taken = []

    @contextlib.contextmanager
    def timer():
        start = len(taken)
        yield lambda: sum(taken[start:])

    monkeypatch.setattr(fastest, "_timer", timer)
    monkeypatch.setattr(fastest, "_winners", {})
    return taken


@pytest.fixture
def candidate(clock):
    def make(name, milliseconds, calls):
        def run():
            calls.append(name)
            clock.append(milliseconds)
            return torch.tensor(len(name))

        return run

    return make


def test_the_fastest_wins_and_is_not_measured_again(candidate):
    calls = []
    candidates = {name: candidate(name, t, calls) for name, t in (("slow", 3.0), ("fast", 1.0), ("medium", 2.0))}
    assert fastest.run("a", candidates) == 4
    assert calls.count("slow") == calls.count("medium") == fastest.ROUNDS + 1 and calls[-1] == "fast"
    calls.clear()
    fastest.run("a", candidates)
    assert calls == ["fast"] and fastest.winners() == {"a": "fast"}


def test_another_kind_of_input_is_measured_for_itself(candidate):
    calls = []
    fastest.run("a", {"x": candidate("x", 1.0, calls), "y": candidate("y", 2.0, calls)})
    fastest.run("b", {"x": candidate("x", 3.0, calls), "y": candidate("y", 2.0, calls)})
    assert fastest.winners() == {"a": "x", "b": "y"}


def test_one_slow_run_decides_nothing(clock):
    times = {"steady": iter([2.0] * 9), "one-outlier": iter([50.0, 1.0, 1.0, 50.0, 1.0, 1.0, 1.0])}
    candidates = {name: lambda name=name: clock.append(next(times[name])) for name in times}
    fastest.run("a", candidates)
    assert fastest.winners() == {"a": "one-outlier"}


def test_a_candidate_that_cannot_run_is_left_out(candidate):
    def fails():
        raise RuntimeError("No available kernel")

    calls = []
    assert fastest.run("a", {"fails": fails, "works": candidate("works", 9.0, calls)}) == 5
    assert fastest.winners() == {"a": "works"}
    with pytest.raises(RuntimeError, match="No available kernel"):
        fastest.run("b", {"fails": fails})
    assert "b" not in fastest.winners()


def test_while_a_graph_is_captured_the_first_one_runs(candidate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    calls = []
    fastest.run("a", {"first": candidate("first", 9.0, calls), "second": candidate("second", 1.0, calls)})
    assert calls == ["first"] and fastest.winners() == {}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (1000, 1024), (1025, 1536), (3000, 3072), (3073, 4096)],
)
def test_bucket(tokens, expected):
    assert fastest.bucket(tokens) == expected
