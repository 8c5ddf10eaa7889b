"""Reports of compiles: collected, remembered, and one warning per reason."""

from __future__ import annotations

import warnings

import pytest
import torch

import zipvl_compile
from zipvl_compile.passes.match.left_dense import BROKEN
from zipvl_compile.passes.match.outcome import Pruning, SiteOutcome
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.tokenwise.zero_rows import LEAVES_THE_GRAPH
from zipvl_compile.pipeline import Rewritten
from zipvl_compile.report import compile_report as module
from zipvl_compile.report.compile_report import collect, recent_reports, record, record_training, split

GRAPH = torch.fx.Graph()
REWRITTEN = SiteOutcome("layers.0.attn", "prefill")
ODD = SiteOutcome("layers.1.attn", "prefill", Reason(Why.MASK_SHAPE, "its mask is odd"))
VISION = SiteOutcome("vision.attn", "other", Reason(Why.ENCODER, "no KV cache"))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(module, "_warned", set())
    module._recent.clear()


def compiled(*outcomes, faults=None):
    """Return what the pipeline made of a graph with these outcomes."""
    return Rewritten(GRAPH, Sites(unread=list(outcomes)), {"match": 0.1}, faults or {})


def test_sites_of_all_passes_are_listed_in_order():
    with pytest.warns(UserWarning, match="its mask is odd"):
        report = record(compiled(REWRITTEN, ODD, VISION))
    assert report.sites == [REWRITTEN, ODD, VISION]
    assert report.rewritten == [REWRITTEN] and report.dense == [ODD, VISION]
    lines = str(report).splitlines()
    assert lines[0] == "zipvl: 1 attention sites rewritten, 2 dense" and "its mask is odd" in lines[2]


def test_a_reason_warns_once_and_what_is_by_design_never():
    with pytest.warns(UserWarning, match=r"leaves layers\.1\.attn dense \(prefill\): its mask is odd") as given:
        record(compiled(ODD, ODD))
    assert len(given) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(compiled(ODD, VISION))


def test_reports_are_collected_inside_the_block_only_and_blocks_nest():
    with collect() as outer:
        record(compiled(REWRITTEN))
        with collect() as inner:
            record(compiled(VISION))
        empty = record(compiled())
    record(compiled(REWRITTEN))
    assert [report.sites for report in outer] == [[REWRITTEN], [VISION], []] and outer[-1] is empty
    assert [report.sites for report in inner] == [[VISION]]


def test_a_block_that_fails_collects_no_more():
    with pytest.raises(KeyError), collect() as reports:
        raise KeyError
    record(compiled(REWRITTEN))
    assert reports == []


def test_recent_reports_are_those_with_attention_and_not_endless(monkeypatch):
    record(compiled())
    first = record(compiled(REWRITTEN))
    assert recent_reports() == zipvl_compile.recent_reports() == [first]
    for _ in range(module._MAX_REPORTS):
        last = record(compiled(REWRITTEN))
    assert len(recent_reports()) == module._MAX_REPORTS
    assert recent_reports()[-1] is last and recent_reports()[0] is not first


def test_seconds_and_faults_of_passes_are_in_the_report():
    report = record(compiled(REWRITTEN, faults={"prune_projections": "KeyError: 'x'"}))
    assert report.seconds == {"match": 0.1} and "pass prune_projections failed: KeyError: 'x'" in str(report)


def test_a_graph_that_is_differentiated_names_every_attention_of_it():
    graph = torch.fx.Graph()
    q = graph.placeholder("q")
    q.meta["example_value"] = torch.zeros(1, 2, 3, 4)
    attention = graph.call_function(torch.nn.functional.scaled_dot_product_attention, (q, q, q))
    graph.output(attention)
    with pytest.warns(UserWarning, match="gradients are on"):
        (site,) = record_training(graph).sites
    assert site.reason is module.GRADIENTS and not site.rewritten


@pytest.mark.parametrize("switch", ["flash_attention_2", "sdpa", "eager", None])
def test_a_graph_break_before_an_attention_is_blamed_on_a_switch_that_is_not_read(monkeypatch, switch):
    monkeypatch.setattr(module, "attention_switch", lambda: switch)
    with pytest.warns(UserWarning, match=r"a graph break lies between|its mask is odd"):
        broken, odd = record(compiled(SiteOutcome("layers.0.attn", "prefill", BROKEN), ODD)).sites
    remedy = ", as attn_implementation='flash_attention_2' may make one: call model.set_attn_implementation('sdpa')"
    assert str(broken.reason) == str(BROKEN) + (remedy if switch == "flash_attention_2" else "") and odd is ODD
    assert broken.reason.why is BROKEN.why


def test_layers_whose_graphs_end_below_the_attention_are_said_once():
    whole = Pruning("layers.0.attn", {"v": "every token attends to its window"})
    ends = Pruning("layers.0.attn", {"output": f"the attention is dense: {LEAVES_THE_GRAPH}"})
    assert split([]) is None and split([whole]) is None
    done = compiled(REWRITTEN)
    done.sites.pruned = [whole, ends, ends]
    with pytest.warns(UserWarning, match=r"only the KV cache is compacted.*one device.*tp_plan='auto'") as given:
        record(done)
        record(done)
    assert len(given) == 1


def test_one_collection_inside_another_ends_alone():
    with collect() as outer:
        with collect() as inner:
            pass
        report = record_training(torch.fx.Graph())
    assert outer == [report] and inner == []
