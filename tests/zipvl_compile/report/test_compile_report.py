"""Reports of compiles: collected, remembered, and one warning per reason."""

from __future__ import annotations

import warnings

import pytest
import torch

import zipvl_compile
from zipvl_compile.passes.match.outcome import PassReport, SiteOutcome
from zipvl_compile.report import compile_report as module
from zipvl_compile.report.compile_report import collect, recent_reports, record

GRAPH = torch.fx.Graph()
REWRITTEN = SiteOutcome("layers.0.attn", "prefill")
ODD = SiteOutcome("layers.1.attn", "prefill", "its mask is odd")
VISION = SiteOutcome("vision.attn", "other", "no KV cache", by_design=True)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(module, "_warned", set())
    module._recent.clear()


def passes(*sites):
    return [PassReport("first", list(sites[:1])), PassReport("second", list(sites[1:]))]


def test_sites_of_all_passes_are_listed_in_order():
    with pytest.warns(UserWarning, match="its mask is odd"):
        report = record(passes(REWRITTEN, ODD, VISION), GRAPH)
    assert report.sites == [REWRITTEN, ODD, VISION]
    assert report.rewritten == [REWRITTEN] and report.dense == [ODD, VISION]
    lines = str(report).splitlines()
    assert lines[0] == "zipvl: 1 attention sites rewritten, 2 dense" and "its mask is odd" in lines[2]


def test_a_reason_warns_once_and_what_is_by_design_never():
    with pytest.warns(UserWarning, match=r"leaves layers\.1\.attn dense \(prefill\): its mask is odd") as given:
        record(passes(ODD, ODD), GRAPH)
    assert len(given) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(passes(ODD, VISION), GRAPH)


def test_reports_are_collected_inside_the_block_only_and_blocks_nest():
    with collect() as outer:
        record(passes(REWRITTEN), GRAPH)
        with collect() as inner:
            record(passes(VISION), GRAPH)
        empty = record([], GRAPH)
    record(passes(REWRITTEN), GRAPH)
    assert [report.sites for report in outer] == [[REWRITTEN], [VISION], []] and outer[-1] is empty
    assert [report.sites for report in inner] == [[VISION]]


def test_a_block_that_fails_collects_no_more():
    with pytest.raises(KeyError), collect() as reports:
        raise KeyError
    record(passes(REWRITTEN), GRAPH)
    assert reports == []


def test_recent_reports_are_those_with_attention_and_not_endless(monkeypatch):
    record([], GRAPH)
    first = record(passes(REWRITTEN), GRAPH)
    assert recent_reports() == zipvl_compile.recent_reports() == [first]
    for _ in range(module._MAX_REPORTS):
        last = record(passes(REWRITTEN), GRAPH)
    assert len(recent_reports()) == module._MAX_REPORTS
    assert recent_reports()[-1] is last and recent_reports()[0] is not first
