"""The pipeline as a whole: options reach the passes, and its report lists every site in the order of the passes."""

import dataclasses

import pytest
import torch

from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes import sparsify_prefill
from zipvl_compile.pipeline import rewrite


@pytest.fixture
def selected(monkeypatch):
    """Return what the prefill pass was called with."""
    seen = {}

    def spy(graph, **given):
        seen.update(given)
        return sparsify_prefill.PassReport("sparsify_prefill")

    monkeypatch.setattr(sparsify_prefill, "apply", spy)
    return seen


def empty_graph():
    graph = torch.fx.Graph()
    graph.output(())
    return graph


def test_every_option_of_the_method_reaches_the_prefill_pass(selected):
    rewrite(
        empty_graph(),
        ZipVLOptions(
            tau=0.5,
            keep_ratio=0.25,
            recent_probes=3,
            random_probes=4,
            seed=5,
            keep_recent=6,
            queries="all",
            evict="keep",
            min_tokens=7,
        ),
    )
    assert selected == {
        "tau": 0.5,
        "keep_ratio": 0.25,
        "recent": 3,
        "random": 4,
        "seed": 5,
        "keep_recent": 6,
        "all_queries": True,
        "drop": False,
        "min_tokens": 7,
    }
    assert set(selected) - {"min_tokens"} == {field.name for field in dataclasses.fields(sparsify_prefill.Selection)}


def test_defaults_are_the_papers(selected):
    rewrite(empty_graph(), ZipVLOptions())
    assert callable(selected.pop("min_tokens")), "the cost model decides"
    assert selected == {
        "tau": 0.975,
        "keep_ratio": None,
        "recent": 64,
        "random": 64,
        "seed": 0,
        "keep_recent": 1,
        "all_queries": False,
        "drop": True,
    }


def test_reports_come_in_the_order_of_the_passes():
    names = [report.name for report in rewrite(empty_graph(), ZipVLOptions())]
    assert names == ["sparsify_prefill", "read_compact_cache", "leave_dense", "demand_rows", "prune_projections"]
