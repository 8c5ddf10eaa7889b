"""The measured choice between implementations: who wins, for which inputs, and what is remembered."""

import pytest
import torch

from zipvl_compile.kernels.common import autotune

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Machine:
    """Two GPUs whose clocks only candidates move: what CUDA would say of their streams."""

    def __init__(self):
        self.now = {FIRST: 0.0, SECOND: 0.0}  # milliseconds of work on the current stream of each
        self.current, self.captured, self.recorded = FIRST, set(), []

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)

    def entered(self, device):
        return Entered(self, device)


class Event:
    def __init__(self, machine):
        self.machine, self.at = machine, None

    def record(self, stream=None):
        device = self.machine.current if stream is None else stream
        self.machine.recorded.append(device)
        self.at = self.machine.now[device]

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, end):
        return end.at - self.at


class Entered:
    def __init__(self, machine, device):
        self.machine, self.device, self.before = machine, device, machine.current

    def __enter__(self):
        self.machine.current = self.device

    def __exit__(self, *error):
        self.machine.current = self.before


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device", found.entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.current in found.captured)
    monkeypatch.setattr(autotune, "_winners", {})
    return found


@pytest.fixture
def candidate(machine):
    def make(name, milliseconds, calls, device=FIRST):
        def run():
            calls.append(name)
            machine.now[device] += milliseconds
            return torch.tensor(len(name))

        return run

    return make


def test_the_fastest_wins_and_is_not_measured_again(candidate):
    calls = []
    candidates = {name: candidate(name, t, calls) for name, t in (("slow", 3.0), ("fast", 1.0), ("medium", 2.0))}
    assert autotune.run("a", candidates, FIRST) == 4
    assert calls.count("slow") == calls.count("medium") == autotune.ROUNDS + 1 and calls[-1] == "fast"
    calls.clear()
    autotune.run("a", candidates, FIRST)
    assert calls == ["fast"] and autotune.winners() == {"a": "fast"}


def test_another_kind_of_input_is_measured_for_itself(candidate):
    calls = []
    autotune.run("a", {"x": candidate("x", 1.0, calls), "y": candidate("y", 2.0, calls)}, FIRST)
    autotune.run("b", {"x": candidate("x", 3.0, calls), "y": candidate("y", 2.0, calls)}, FIRST)
    assert autotune.winners() == {"a": "x", "b": "y"}


def test_times_are_taken_where_the_tensors_are(candidate, machine):
    calls = []
    given = {"slow": candidate("slow", 3.0, calls, SECOND), "fast": candidate("fast", 1.0, calls, SECOND)}
    assert machine.current == FIRST
    autotune.run("a", given, SECOND)
    assert set(machine.recorded) == {SECOND} and machine.current == FIRST
    assert autotune.winners() == {"a": "fast"}
    assert autotune.measure(given, SECOND) == {"slow": 3e-3, "fast": 1e-3}, "in seconds"


def test_one_slow_run_decides_nothing(machine):
    times = {"steady": iter([2.0] * 9), "one-outlier": iter([50.0, 1.0, 1.0, 50.0, 1.0, 1.0, 1.0])}

    def run(name):
        machine.now[FIRST] += next(times[name])

    autotune.run("a", {name: lambda name=name: run(name) for name in times}, FIRST)
    assert autotune.winners() == {"a": "one-outlier"}


ERRORS = {
    "no-kernel": RuntimeError("No available kernel"),
    "out-of-memory": torch.OutOfMemoryError("CUDA out of memory"),
    "out-of-registers": autotune.TritonError("out of resource"),
}


@pytest.mark.parametrize("round_", range(autotune.ROUNDS + 1))
@pytest.mark.parametrize("error", ERRORS)
def test_a_candidate_that_fails_is_left_out(candidate, error, round_):
    rounds = iter(range(autotune.ROUNDS + 1))

    def fails():
        if next(rounds) == round_:
            raise ERRORS[error]
        return torch.tensor(0)

    calls = []
    assert autotune.run("a", {"fails": fails, "works": candidate("works", 9.0, calls)}, FIRST) == 5
    assert autotune.winners() == {"a": "works"} and len(calls) == autotune.ROUNDS + 2


def test_an_error_in_the_code_is_not_hidden(candidate):
    def broken():
        raise TypeError("an argument is missing")

    with pytest.raises(TypeError, match="an argument is missing"):
        autotune.run("a", {"works": candidate("works", 1.0, []), "broken": broken}, FIRST)


def test_where_nothing_works_the_first_one_says_why(machine):
    def fails():
        raise RuntimeError("No available kernel")

    def fails_too():
        raise RuntimeError("another reason")

    with pytest.raises(RuntimeError, match="No available kernel"):
        autotune.run("b", {"fails": fails, "fails, too": fails_too}, FIRST)
    assert autotune.winners() == {}


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_while_a_graph_is_captured_the_first_one_runs(candidate, machine, device):
    machine.captured.add(device)
    calls = []
    given = {"first": candidate("first", 9.0, calls, device), "second": candidate("second", 1.0, calls, device)}
    autotune.run("a", given, device)
    assert calls == ["first"] and autotune.winners() == {}
    machine.captured.clear()
    autotune.run("a", given, device)
    machine.captured.add(device)
    calls.clear()
    autotune.run("a", given, device)
    assert calls == ["second"], "what was measured before"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (1000, 1024), (1025, 1536), (3000, 3072), (3073, 4096)],
)
def test_bucket(tokens, expected):
    assert autotune.bucket(tokens) == expected
