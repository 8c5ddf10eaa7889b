"""The tables of the demo: what their rows say, within 80 columns."""

import io

import pytest
import torch

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")
pytest.importorskip("sklearn", reason="an extra: pip install 'zipvl-compile[demo]'")

from rich.console import Console

from zipvl_compile.demo import tables
from zipvl_compile.demo.budgets import Budgeted
from zipvl_compile.demo.compare import Answer, Comparison


def text(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def rows(table):
    return [line.split() for line in text(table).splitlines()]


def made(kept, first, later, used):
    return Answer("x", 100, [torch.arange(n) for n in kept], first, later, used, 2 * used)


RESULT = Comparison(
    {
        "dense": [made((100, 100), 0.2, 0.01, 4_000_000)],
        "zipvl": [made((100, 100), 0.2, 0.01, 4_000_000)],
        "chosen": [made((40, 60), 0.1, None, 2_000_000)],
    }
)


def test_accuracy_per_kind_and_of_all():
    found = rows(
        tables.accuracy(
            ["a_b", "c", "a_b"], {"dense": [True, True, False], "zipvl": [True, False, False]}, [True, False, True]
        )
    )
    assert ["a", "b", "2", "50.0%", "50.0%", "100.0%"] in found
    assert ["c", "1", "100.0%", "0.0%", "0.0%"] in found
    assert ["all", "3", "66.7%", "33.3%", "66.7%"] in found


def test_kept_tokens_per_layer_and_their_mean():
    found = rows(tables.kept(RESULT))
    assert ["0", "40.0", "40.0%"] in found and ["1", "60.0", "60.0%"] in found and ["mean", "50.0", "50.0%"] in found


def test_a_layer_of_another_kind_is_named():
    """And where no layer kept a part of its tokens, there is no mean of them."""
    kinds = ["sliding window", "full attention"]
    other = Comparison({"zipvl": [Answer("x", 10, [None, torch.arange(5)], 1, None, 1, 1, kinds)]})
    assert ["0", "sliding", "window"] in rows(tables.kept(other)) and "mean" in text(tables.kept(other)).split()
    windows = Comparison({"zipvl": [Answer("x", 10, [None], 1, None, 1, 1, kinds[:1])]})
    assert "sliding window" in text(tables.kept(windows)) and "mean" not in text(tables.kept(windows)).split()


def test_costs_with_their_ratios():
    found = text(tables.costs(RESULT))
    assert (
        "4.0 MB (1.00x)" in found and "2.0 MB (0.50x)" in found and "200.0 ms" in found and "100.0 ms (0.50x)" in found
    )
    assert "decode" not in found, "one of them made no further token"
    assert max(map(len, found.splitlines())) <= 80


def test_budgets_count_right_answers_with_chosen_and_with_random_tokens():
    found = rows(tables.budgets([Budgeted(0.03, [True, True, False], [False, True, False])]))
    assert ["3%", "of", "the", "prompt", "2", "of", "3", "1", "of", "3"] in found


def test_what_was_won_is_one_line():
    dense = [made((100,), 0.4, 0.010, 4_000_000), made((100,), 0.6, 0.010, 4_000_000)]
    zipvl = [made((25,), 0.2, 0.012, 1_000_000), made((25,), 0.2, 0.012, 1_000_000)]
    line = tables.won(Comparison({"dense": dense, "zipvl": zipvl}))
    assert line == (
        "zipvl: prefill 2.5x faster (500.0 ms -> 200.0 ms), decode 1.2x slower (10.0 ms -> 12.0 ms), "
        "KV cache 4.0x smaller (8.0 MB -> 2.0 MB), 2 of 2 answers the same."
    )
    assert "decode" not in tables.won(RESULT), "one of them made no further token"


def test_examples_fit_the_terminal_and_are_shown_as_they_are():
    found = text(tables.examples(["dense", "zipvl"], [("what ? " * 20, "7", "[bold]", "8")]))
    assert "right" in found and "[bold]" in found and all(len(line) <= 80 for line in found.splitlines())
