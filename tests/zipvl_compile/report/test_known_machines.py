"""Machines measured before: what stands in where measuring fails."""

import dataclasses
import json

import pytest
import torch
from support.source_tree import ROOT

from zipvl_compile.passes.cost_model import AttentionShape, break_even, seconds
from zipvl_compile.report.known_machines import CARDS, CPU, GENERIC, H100, card, known_machine, scaled

PROMPT_OF_13B = AttentionShape(1, 40, 40, 128, 128, 128, 2)


@pytest.mark.parametrize("known", [CPU, H100], ids=["cpu", "h100"])
def test_every_constant_is_there(known):
    zero = {field.name for field in dataclasses.fields(known) if not getattr(known, field.name) > 0}
    assert zero == ({"host"} if known is CPU else set()), "a CPU is its own host"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_its_name(monkeypatch, name, row):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    published = CARDS[row] if row else GENERIC
    assert card(name) is published
    assert known_machine(torch.device("cuda", 1)) == scaled(published, torch.bfloat16)


def test_all_else_is_a_cpu():
    assert known_machine(torch.device("cpu")) is known_machine(torch.device("mps")) is CPU


def test_other_cards_are_the_h100_in_their_proportions():
    assert scaled(CARDS["H100"], torch.bfloat16) == H100
    l4 = scaled(CARDS["L4"], torch.bfloat16)
    assert l4.attend / H100.attend == pytest.approx(989 / 121) and l4.byte / H100.byte == pytest.approx(3350 / 300)
    assert (l4.site, l4.host) == (H100.site, H100.host) and l4.masked < H100.masked
    assert scaled(CARDS["H100"], torch.float32).attend > 10 * H100.attend


def test_slow_cards_gain_from_shorter_prompts():
    """Arithmetic takes them longer, and the host and the launches no longer than others."""
    lengths = {name: break_even(PROMPT_OF_13B, scaled(CARDS[name], torch.bfloat16), 0.367) for name in ("H100", "L4")}
    assert 64 < lengths["L4"] < lengths["H100"]


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
