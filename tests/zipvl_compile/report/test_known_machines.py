"""Machines measured before: what stands in where measuring fails."""

import dataclasses
import json

import pytest
import torch
from support.source_tree import ROOT

from zipvl_compile.passes.cost_model import AttentionShape, break_even, seconds
from zipvl_compile.report.known_machines import CPU, H100, known_machine

PROMPT_OF_13B = AttentionShape(1, 40, 40, 128, 128, 128, 2)


@pytest.mark.parametrize("known", [CPU, H100], ids=["cpu", "h100"])
def test_every_constant_is_there(known):
    zero = {field.name for field in dataclasses.fields(known) if not getattr(known, field.name) > 0}
    assert zero == ({"host", "product"} if known is CPU else set()), "a CPU is its own host"


def test_a_gpu_is_taken_for_an_h100_and_all_else_for_a_cpu():
    assert known_machine(torch.device("cuda", 1)) is H100
    assert known_machine(torch.device("cpu")) is known_machine(torch.device("mps")) is CPU


def measured(bench: str, case: str, variant: str) -> float:
    """Return the latest time of a case on the H100, in seconds."""
    rows = map(json.loads, (ROOT / "benchmarks/results/gpu.jsonl").read_text().splitlines())
    key = {"bench": bench, "case": case, "variant": variant, "metric": "time"}
    return [row["value"] / 1e3 for row in rows if key.items() <= row.items()][-1]


@pytest.mark.parametrize("n", [4096, 8192, 16384])
def test_dense_attention_of_the_h100_is_what_was_measured(n):
    case = f"p {n}, n {int(n / 0.367)}, 40 heads, head_dim 128, bf16"
    dense, _ = seconds(PROMPT_OF_13B, H100, n, 0.367)
    assert dense == pytest.approx(measured("sparse_attention", case, "dense cudnn_attention"), rel=0.05)


@pytest.mark.parametrize("n", [16384, 65536])
def test_scores_selection_and_gather_of_the_h100_are_what_was_measured(n):
    case = f"n {n}, 40 heads, head_dim 128, bf16, {{'keep_ratio': 0.367}}"
    dense_of_kept, _ = seconds(PROMPT_OF_13B, H100, round(0.367 * n), 1.0)
    _, sparse = seconds(PROMPT_OF_13B, H100, n, 0.367)
    # The model counts gathers of Q and rows put back, too, which this case does not measure.
    assert 1 < (sparse - dense_of_kept) / measured("selection", case, "scores + selection + gather") < 2


def test_sparse_prefill_pays_on_both_from_lengths_that_make_sense():
    assert 256 < break_even(AttentionShape(1, 8, 2, 64, 64, 128, 4), CPU, 0.367) < 2048
    assert 1024 < break_even(PROMPT_OF_13B, H100, 0.367) < 8192
