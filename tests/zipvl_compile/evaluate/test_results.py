"""Lines, tables, and what a measurement depends on."""

import csv
import json

import pytest

from zipvl_compile.evaluate.results import (
    BENCH,
    ITEMS,
    LINES,
    append,
    append_items,
    environment,
    newest,
    rounded,
    write_table,
)

ABOUT = {"hardware", "torch", "transformers", "triton", "commit", "date"}


def test_one_measurement_a_line(tmp_path):
    append(tmp_path, "case, one", "tau 0.9", {"nll": (2.0000004, "nats"), "kv_bytes": (12345678.4, "bytes")})
    lines = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert [(line["metric"], line["value"], line["unit"]) for line in lines] == [
        ("nll", 2.0, "nats"), ("kv_bytes", 12345678, "bytes"),
    ]  # fmt: skip
    for line in lines:
        assert line.keys() == {"bench", "case", "variant", "metric", "value", "unit"} | ABOUT
        assert (line["bench"], line["case"], line["variant"]) == (BENCH, "case, one", "tau 0.9")


def test_the_newest_value_counts_and_the_table_has_a_line_per_variant(tmp_path):
    append(tmp_path, "a, b", "dense", {"nll": (2.0, "nats"), "kept": (1.0, "fraction")})
    append(tmp_path, "a, b", "tau 0.9", {"nll": (3.0, "nats"), "kl": (0.5, "nats")})
    append(tmp_path, "a, b", "tau 0.9", {"nll": (2.5, "nats")})
    rows = newest(tmp_path)
    assert rows == {("a, b", "dense"): {"nll": 2.0, "kept": 1.0}, ("a, b", "tau 0.9"): {"nll": 2.5, "kl": 0.5}}
    with write_table(tmp_path, rows).open(newline="") as table:
        assert list(csv.DictReader(table)) == [
            {"case": "a, b", "variant": "dense", "nll": "2.0", "kept": "1.0", "kl": ""},
            {"case": "a, b", "variant": "tau 0.9", "nll": "2.5", "kept": "", "kl": "0.5"},
        ]


def test_items_can_be_paired_later(tmp_path):
    append_items(tmp_path, "a", "dense", [{"item": "d0", "nll": 1.5, "groups": ("x", "y")}])
    line = json.loads((tmp_path / ITEMS).read_text())
    assert (line["case"], line["variant"], line["item"], line["nll"], line["groups"]) == (
        "a",
        "dense",
        "d0",
        1.5,
        ["x", "y"],
    )
    assert {"commit", "date"} <= line.keys()


def test_numbers_have_six_digits_and_are_finite():
    assert rounded(0.12345678) == 0.123457 and rounded(1.5e12 + 0.4) == 1500000000000
    with pytest.raises(ValueError, match="expected a finite number, got nan"):
        rounded(float("nan"))


def test_outside_of_a_checkout_there_is_no_commit(tmp_path):
    about = environment(tmp_path)
    assert about.keys() == ABOUT and about["commit"] == "" and "threads" in about["hardware"]
